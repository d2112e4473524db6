"""Reads and writes the files that hold the state of a run and of its stages.

A "start" of a stage is one launch of its processes. This module does not import torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from yaml import YAMLError

from recipes.core.errors import RecipeError
from recipes.core.files import read_json, read_yaml, sync, write_json, write_yaml
from recipes.core.fingerprint import result_settings, stage_code, stage_fingerprint
from recipes.core.manifest import (
    ARTIFACT,
    FORMAT,
    MANIFEST,
    WORK,
    Manifest,
    read_manifest,
    replaced_inputs,
    require_format,
    write_manifest,
)
from recipes.core.metrics import METRICS, RESULT_METRICS, Record, read_records
from recipes.core.snapshot import CODE, is_snapshot
from recipes.core.stage import StageConfig
from recipes.core.versions import result_versions
from recipes.core.watchdog import STACKS, hang_error

RUN_FILE = "run.yaml"
"""File in a run directory with the last plan."""
TRACKER = "tracker.json"
"""File in a run directory with the tracker's settings and the run's id in the tracker."""
REQUEST = "config.yaml"
"""File in a stage's directory with the stage's ``Request``."""
BEGUN = "begun.json"
"""File in ``work/`` with the manifest, still without results, of the start that wrote the work."""
OUTCOME = "outcome.json"
"""File in ``work/`` with the reason why the last start ended without a result."""


@dataclass(frozen=True)
class InputRef:
    """The input that a stage needs: a stage's directory, its artifact's type, its fingerprint."""

    directory: Path
    kind: str
    fingerprint: str

    @classmethod
    def of(cls, stage_dir: Path) -> InputRef:
        """Returns a reference to a stage's result. Raises ``RecipeError`` if it is not complete."""
        manifest = read_manifest(stage_dir)
        if manifest is None:
            raise RecipeError(f"{stage_dir} is not complete.", "the same command runs it first")
        return cls(stage_dir, manifest.kind, manifest.fingerprint)


def content_of(inputs: Mapping[str, InputRef]) -> dict[str, str]:
    """Returns the content hash of each input, by name. Omits stages that are not complete."""
    manifests = {name: read_manifest(ref.directory) for name, ref in inputs.items()}
    return {name: m.content_hash() for name, m in manifests.items() if m is not None}


@dataclass(frozen=True)
class Request:
    """Everything that a stage's process needs to start: the content of ``config.yaml``."""

    name: str
    """The stage's name in its run."""
    fingerprint: str
    code: str
    """Fingerprint of the stage's code, which is part of ``fingerprint``."""
    inputs: Mapping[str, InputRef]
    config: Mapping[str, Any]
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Versions that are part of ``fingerprint``, by library."""
    kept: Mapping[str, list[str]] = field(default_factory=dict)
    """Stale inputs that the user kept: by stage, the reasons why its result is stale."""
    snapshot: str | None = None
    """Hash of the code to run; ``None`` for a stage that another stage starts."""
    git_sha: str | None = None
    """Commit of the checkout from which the snapshot was copied."""
    devices: int = 1
    """Devices per node that the stage uses, which may be more than its processes."""

    def write(self, stage_dir: Path) -> Path:
        """Writes the request to ``config.yaml`` and returns the file's path."""
        stage_dir.mkdir(parents=True, exist_ok=True)
        plain_inputs = {
            name: {**vars(ref), "directory": str(ref.directory)}  # YAML has no type for paths
            for name, ref in self.inputs.items()
        }
        file = stage_dir / REQUEST
        write_yaml(file, {"format": FORMAT, **vars(self), "inputs": plain_inputs})
        return file


def request_of(
    name: str,
    config: StageConfig,
    inputs: Mapping[str, InputRef],
    *,
    starts: Collection[str] = (),
    external: Mapping[str, object] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Request:
    """Builds the request of a stage.

    Args:
        name: The stage's name in its run, which is the name of its directory.
        config: The stage's settings.
        inputs: The stage's inputs.
        starts: Types of stages that this stage starts. Their code counts as this stage's code.
        external: ``external_stamp`` of each path from outside the run, by name.
        versions: Version of each library, for the fingerprint; by default ``result_versions()``.
    """
    code, libraries = stage_code([config.stage, *starts]), versions or result_versions()
    input_fingerprints = {key: ref.fingerprint for key, ref in inputs.items()}
    settings = result_settings(config)
    fingerprint = stage_fingerprint(settings, code, libraries, input_fingerprints, external or {})
    devices = config.resources.devices
    return Request(name, fingerprint, code, inputs, asdict(config), libraries, devices=devices)


def read_request(stage_dir: Path) -> Request:
    """Reads a stage's request. Raises ``RecipeError`` if its format is not ``FORMAT``."""
    file = stage_dir / REQUEST
    plain = read_yaml(file)
    require_format(plain.pop("format", None), file)
    inputs = plain.pop("inputs")
    for ref in inputs.values():
        ref["directory"] = Path(ref["directory"])
    return Request(**plain, inputs={name: InputRef(**ref) for name, ref in inputs.items()})


@dataclass(frozen=True)
class LastPlan:
    """A run's recipe and, for each stage, the fingerprint in the last plan that included it."""

    recipe: str
    stages: Mapping[str, str | None]
    """Fingerprints by stage, in the recipe's order; ``None`` for a stage that no plan included."""
    replaces: Mapping[str, str | None] = field(default_factory=dict)
    """Stages that ``force`` runs again, in this plan or in an earlier one that did not finish them.
    By stage: ``started_at`` of its old result, or ``None`` without an old result."""

    def write(self, run_dir: Path) -> None:
        """Writes the plan to ``run.yaml``."""
        write_yaml(run_dir / RUN_FILE, {"format": FORMAT, **vars(self)})


def read_last_plan(run_dir: Path) -> LastPlan | None:
    """Reads the last plan of a run; returns ``None`` if the directory has no ``run.yaml``.

    Raises ``RecipeError`` if another version of this repository wrote the file or it is damaged.
    """
    file = run_dir / RUN_FILE
    if not file.is_file():
        return None
    try:
        plain = read_yaml(file)
        require_format(plain.get("format"), file)
        return LastPlan(str(plain["recipe"]), dict(plain["stages"]), dict(plain["replaces"]))
    except (AttributeError, KeyError, TypeError, ValueError, YAMLError) as error:
        fix = "restore the file, or choose another run_dir"
        raise RecipeError(f"{file} is not the plan of a run.", fix) from error


class Status(StrEnum):
    """State of a stage. Only the launcher uses ``RUNNING``, ``PENDING`` and ``CANCELLED``."""

    COMPLETE = "complete"
    FAILED = "failed"
    HUNG = "hung"
    STOPPED = "stopped"
    """The stage stopped at its deadline. Its work is saved, and the next start resumes it."""
    INTERRUPTED = "interrupted"
    """The stage was killed: there is unfinished work, but no recorded reason."""
    NOT_STARTED = "not started"
    RUNNING = "running"
    PENDING = "pending"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class StageState:
    """State of a stage according to its files."""

    directory: Path
    status: Status
    result: Manifest | None
    """Manifest of the last complete result. It may be stale, that is, have another fingerprint."""
    begun: Manifest | None
    """Manifest of the start that wrote the unfinished work; ``None`` without unfinished work."""
    error: str = ""
    """Why the stage failed, hung or stopped."""
    leftover: bool = False
    """Whether ``work/`` belongs to the complete result, and only a kill prevented its deletion."""

    @property
    def started(self) -> bool:
        """Whether the stage has ever been started."""
        return self.result is not None or (self.directory / WORK).exists()

    def progress(self) -> list[Record]:
        """Returns the stage's progress records."""
        return [r for r in read_records(self.directory / METRICS) if "task" in r]


def stage_state(stage_dir: Path, fingerprint: str | None = None) -> StageState:
    """Returns the state of a stage. A stage that has a result with ``fingerprint`` is complete.

    If ``fingerprint`` is ``None``, a stage with any result is complete.
    """
    work = stage_dir / WORK
    result, begun = read_manifest(stage_dir), read_manifest(work, BEGUN)
    # Work belongs to the result if the same start wrote both. Work without a manifest also counts
    # as the result's, because no start resumes it.
    is_unfinished = begun is not None and (result is None or result.started_at != begun.started_at)
    leftover = result is not None and work.exists() and not is_unfinished
    if leftover:
        begun = None
    state = StageState(stage_dir, Status.NOT_STARTED, result, begun, leftover=leftover)
    if result is not None and fingerprint in (None, result.fingerprint):
        return replace(state, status=Status.COMPLETE)
    if (status_and_reason := last_end(stage_dir)) is not None:
        status, reason = status_and_reason
        return replace(state, status=status, error=reason)
    return replace(state, status=Status.INTERRUPTED) if begun else state


def last_end(stage_dir: Path) -> tuple[Status, str] | None:
    """Returns how and why the last start failed, hung or stopped; ``None`` without a record."""
    work = stage_dir / WORK
    if (problem := hang_error(work)) is not None:
        return Status.HUNG, str(problem)
    if not (work / OUTCOME).exists():
        return None
    outcome = read_json(work / OUTCOME)
    return Status.STOPPED if outcome["stopped"] else Status.FAILED, str(outcome["error"])


def stage_states(run_dir: Path, include: Collection[str] = ()) -> dict[str, StageState]:
    """Returns the state of each stage that has a request and was planned or started, by name.

    Stages of the last plan come first, in the plan's order. Stages in ``include`` that have a
    request are returned even if they were neither planned nor started.
    """
    plan = read_last_plan(run_dir)
    planned = plan.stages if plan is not None else {}
    requested = {file.parent.name for file in run_dir.glob(f"*/{REQUEST}")}
    names = [name for name in planned if name in requested] + sorted(requested - planned.keys())
    states = {name: stage_state(run_dir / name, planned.get(name)) for name in names}
    included = {*planned, *include}
    return {name: state for name, state in states.items() if name in included or state.started}


def remove_unused_snapshots(run_dir: Path) -> None:
    """Deletes snapshots that no request, result or unfinished work of a run refers to.

    The caller must hold the run's lock.
    """
    snapshots = [path for path in (run_dir / CODE).glob("*") if is_snapshot(path)]
    if len(snapshots) < 2:  # a single snapshot is in use
        return
    stage_dirs = [file.parent for file in run_dir.glob(f"*/{REQUEST}")]
    used_names = {read_request(stage_dir).snapshot for stage_dir in stage_dirs}
    for state in map(stage_state, stage_dirs):
        used_names |= {manifest.snapshot for manifest in (state.result, state.begun) if manifest}
    for snapshot in snapshots:
        if snapshot.name not in used_names:
            shutil.rmtree(snapshot)


def begin_work(stage_dir: Path, begun: Manifest) -> Manifest:
    """Prepares ``work/`` for a start, with an empty ``work/artifact/`` and ``begun.json``.

    Work with the same fingerprint and inputs stays, so that training can resume. Other work is
    deleted.

    Args:
        stage_dir: The stage's directory.
        begun: The start's manifest, with the current ``input_content``.

    Returns:
        The manifest in ``begun.json``. The field ``seconds`` is the time that earlier starts spent
        on this work: each start counts until its last metrics record. The field ``input_content``
        has only the inputs that an earlier start has hashed.

    Raises:
        RecipeError: Work with another fingerprint cannot be deleted.
    """
    work, earlier = stage_dir / WORK, stage_state(stage_dir).begun
    replaced = replaced_inputs(earlier.input_content, begun.input_content) if earlier else []
    if replaced:
        print(f"input {', '.join(replaced)} was replaced, so this stage starts over", flush=True)
    if earlier is None or replaced or earlier.fingerprint != begun.fingerprint:
        discard_work(stage_dir)
        # Training would resume from remaining files, except hidden ones, which NFS keeps if open.
        if work.is_symlink() or any(work.glob("[!.]*")):
            what = f"{work} cannot be deleted: it is a link, or has files of another user."
            raise RecipeError(what, "delete it, then repeat the command")
        metrics, old_metrics = stage_dir / METRICS, stage_dir / RESULT_METRICS
        has_result = (stage_dir / MANIFEST).exists()
        if has_result and metrics.exists() and not old_metrics.exists():
            metrics.rename(old_metrics)  # the old result stays until this stage is complete
        metrics.unlink(missing_ok=True)
        begun = replace(begun, input_content={})
    else:
        seconds = earlier.seconds + _recorded_seconds(stage_dir, earlier)
        begun = replace(begun, seconds=seconds, input_content=earlier.input_content)
    shutil.rmtree(work / ARTIFACT, ignore_errors=True)
    (work / ARTIFACT).mkdir(parents=True)
    write_manifest(work, begun, BEGUN)
    forget_outcome(stage_dir)
    return begun


def _recorded_seconds(stage_dir: Path, begun: Manifest) -> float:
    """Returns the seconds from a start to its last metrics record; 0 if it wrote no record."""
    started = datetime.fromisoformat(begun.started_at).timestamp()
    times: list[float] = [record["time"] - started for record in read_records(stage_dir / METRICS)]
    return max([0.0, *times])


def complete_stage(stage_dir: Path, manifest: Manifest) -> None:
    """Makes ``work/artifact/``, whose files the caller has synced, the stage's result.

    The old manifest is deleted first and the new manifest is written last, so the stage is
    incomplete if it is killed in between. Work is deleted after the result is on the disk.
    """
    (stage_dir / MANIFEST).unlink(missing_ok=True)
    (stage_dir / RESULT_METRICS).unlink(missing_ok=True)
    target = stage_dir / ARTIFACT
    if target.exists():
        shutil.rmtree(target)
    (stage_dir / WORK / ARTIFACT).rename(target)
    write_manifest(stage_dir, manifest)
    sync(stage_dir)
    discard_work(stage_dir)


def record_failure(
    stage_dir: Path, error: str, *, stopped: bool = False, overwrite: bool = True
) -> None:
    """Records that a start ended without a result. ``error`` says why.

    ``stopped`` says whether the stage stopped at its deadline, and ``overwrite`` whether to replace
    a reason that another rank has recorded.
    """
    work = stage_dir / WORK
    work.mkdir(exist_ok=True)
    if overwrite or not (work / OUTCOME).exists():
        write_json(work / OUTCOME, {"stopped": stopped, "error": error})


def forget_outcome(stage_dir: Path) -> None:
    """Deletes the records of why earlier starts ended."""
    work = stage_dir / WORK
    for file in (work / OUTCOME, *work.glob(STACKS.format("*"))):
        file.unlink(missing_ok=True)


def discard_work(stage_dir: Path) -> None:
    """Deletes unfinished work: the manifest first, so that no start resumes half-deleted work."""
    work = stage_dir / WORK
    (work / BEGUN).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
