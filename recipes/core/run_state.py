"""The state of a run and of its stages: the files that hold it, and what they mean together.

Everything that asks or changes that state does so here: the launcher, a stage's worker, a report.
CONTRIBUTING.md, "How data flows", lists the files. Torch-free.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json, write_text_atomically
from recipes.core.fingerprint import result_settings, stage_code, stage_fingerprint
from recipes.core.manifest import (
    ARTIFACT,
    FORMAT,
    MANIFEST,
    WORK,
    Manifest,
    read_manifest,
    require_format,
    write_manifest,
)
from recipes.core.metrics import METRICS, Record, read_records
from recipes.core.stage import StageConfig
from recipes.core.versions import result_versions
from recipes.core.watchdog import STACKS, hang_error

RUN_FILE = "run.yaml"
"""In a run directory: the plan that was made last."""
REQUEST = "config.yaml"
"""In a stage's directory: what the stage is started with."""
BEGUN = "begun.json"
"""In ``work/``: the manifest, as yet without a result, of the start that the work belongs to."""
OUTCOME = "outcome.json"
"""In ``work/``: why the last start ended without a result."""


@dataclass(frozen=True)
class InputRef:
    """Where an input of a stage is, and what it must be."""

    directory: Path
    kind: str
    fingerprint: str

    @classmethod
    def of(cls, stage_dir: Path) -> InputRef:
        """Refers to the result of a stage; refuses a stage that is not complete."""
        manifest = read_manifest(stage_dir)
        if manifest is None:
            raise RecipeError(f"{stage_dir} is not complete.", "the same command runs it first")
        return cls(stage_dir, manifest.kind, manifest.fingerprint)


@dataclass(frozen=True)
class Request:
    """What a stage is started with: the content of its ``config.yaml``."""

    name: str
    fingerprint: str
    code: str
    inputs: Mapping[str, InputRef]
    config: Mapping[str, Any]
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Versions that are part of the fingerprint."""

    def write(self, stage_dir: Path) -> Path:
        """Writes the request and returns its file."""
        stage_dir.mkdir(parents=True, exist_ok=True)
        inputs = {n: {**vars(r), "directory": str(r.directory)} for n, r in self.inputs.items()}
        text = OmegaConf.to_yaml({**vars(self), "inputs": inputs})
        write_text_atomically(stage_dir / REQUEST, text)
        return stage_dir / REQUEST


def request_of(
    name: str,
    config: StageConfig,
    inputs: Mapping[str, InputRef],
    *,
    starts: Collection[str] = (),
    external: Mapping[str, object] | None = None,
    in_image: bool = False,
) -> Request:
    """Builds the request of a stage.

    Args:
        name: The stage's name in its run.
        config: Its settings.
        inputs: Its inputs.
        starts: Stages that it starts itself, whose code counts as its own.
        external: Stamps of the files that it reads from outside the run.
        in_image: Whether it runs in an image, not with the libraries that are installed here.
    """
    code, libraries = stage_code([config.stage, *starts]), result_versions(in_image)
    prints = {key: ref.fingerprint for key, ref in inputs.items()}
    settings = result_settings(config)
    fingerprint = stage_fingerprint(settings, code, libraries, prints, external or {})
    return Request(name, fingerprint, code, inputs, asdict(config), libraries)


def read_request(stage_dir: Path) -> Request:
    """Reads what a stage is started with."""
    plain: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(stage_dir / REQUEST))  # type: ignore[assignment]
    inputs = {
        name: InputRef(Path(spec["directory"]), spec["kind"], spec["fingerprint"])
        for name, spec in plain["inputs"].items()
    }
    return Request(**{**plain, "inputs": inputs})


@dataclass(frozen=True)
class LastPlan:
    """A run as it was planned last."""

    recipe: str
    stages: Mapping[str, str | None]
    """Fingerprints by stage, in order; ``None`` of a stage that has never been planned to run."""

    def write(self, run_dir: Path) -> None:
        """Writes it to ``run.yaml``."""
        text = OmegaConf.to_yaml({"format": FORMAT, **vars(self)})
        write_text_atomically(run_dir / RUN_FILE, text)


def read_last_plan(run_dir: Path) -> LastPlan | None:
    """Reads the last plan of a run; ``None`` of a directory that is no run.

    Raises:
        RecipeError: Another version of this repository wrote it.
    """
    file = run_dir / RUN_FILE
    if not file.is_file():
        return None
    plain: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(file))  # type: ignore[assignment]
    require_format(plain.get("format"), file)
    return LastPlan(str(plain["recipe"]), plain["stages"])


class Status(StrEnum):
    """What has become of a stage. The last three are known to the launcher alone."""

    COMPLETE = "complete"
    FAILED = "failed"
    HUNG = "hung"
    STOPPED = "stopped"
    """By the clock: its work is saved, and it only needs to be started again."""
    INTERRUPTED = "interrupted"
    """Killed: it left unfinished work and no reason."""
    NOT_STARTED = "not started"
    RUNNING = "running"
    PENDING = "pending"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class StageState:
    """What the files of a stage say about it."""

    directory: Path
    status: Status
    result: Manifest | None
    """The last complete result, which may be of another fingerprint."""
    begun: Manifest | None
    """The start that unfinished work belongs to; ``None`` without unfinished work."""
    error: str = ""
    """Why it failed, hung or was stopped."""
    leftover: bool = False
    """Whether ``work/`` is that of the result: a kill came before it was deleted."""

    @property
    def started(self) -> bool:
        """Whether it has ever been started."""
        return self.result is not None or (self.directory / WORK).exists()

    def progress(self) -> list[Record]:
        """Returns its records of progress."""
        return [r for r in read_records(self.directory / METRICS) if "task" in r]


def stage_state(stage_dir: Path, fingerprint: str | None = None) -> StageState:
    """Returns the state of a stage.

    Args:
        stage_dir: The stage's directory.
        fingerprint: That a result must have to count; any counts if it is ``None``.
    """
    work = stage_dir / WORK
    result, begun = read_manifest(stage_dir), read_manifest(work, BEGUN)
    same_start = begun is None or (result is not None and result.started_at == begun.started_at)
    leftover = result is not None and work.exists() and same_start
    if leftover:
        begun = None
    state = StageState(stage_dir, Status.NOT_STARTED, result, begun, leftover=leftover)
    if result is not None and fingerprint in (None, result.fingerprint):
        return replace(state, status=Status.COMPLETE)
    if (end := last_end(stage_dir)) is not None:
        return replace(state, status=end[0], error=end[1])
    return state if begun is None else replace(state, status=Status.INTERRUPTED)


def last_end(stage_dir: Path) -> tuple[Status, str] | None:
    """Says how and why the last start of a stage ended without a result, if it left word."""
    work = stage_dir / WORK
    if (problem := hang_error(work)) is not None:
        return Status.HUNG, str(problem)
    if not (work / OUTCOME).exists():
        return None
    outcome = read_json(work / OUTCOME)
    return Status.STOPPED if outcome["stopped"] else Status.FAILED, str(outcome["error"])


def stage_states(run_dir: Path, also: Collection[str] = ()) -> dict[str, StageState]:
    """Returns the states of a run's stages, in the order of its last plan.

    A stage that is no longer in the plan is left out unless it was started, or is in ``also``.
    """
    plan = read_last_plan(run_dir)
    planned = plan.stages if plan is not None else {}
    folders = sorted(file.parent.name for file in run_dir.glob(f"*/{REQUEST}"))
    names = [n for n in planned if n in folders] + [n for n in folders if n not in planned]
    states = {name: stage_state(run_dir / name, planned.get(name)) for name in names}
    return {n: s for n, s in states.items() if n in planned or n in also or s.started}


def begin_work(stage_dir: Path, begun: Manifest) -> None:
    """Makes ``work/`` ready for a start, with an empty ``work/artifact/``.

    Work of the same fingerprint stays, so that training can resume; any other is deleted.
    """
    work, before = stage_dir / WORK, stage_state(stage_dir).begun
    if before is None or before.fingerprint != begun.fingerprint:
        discard_work(stage_dir)
        (stage_dir / METRICS).unlink(missing_ok=True)
    shutil.rmtree(work / ARTIFACT, ignore_errors=True)
    (work / ARTIFACT).mkdir(parents=True)
    write_manifest(work, begun, BEGUN)
    forget_outcome(stage_dir)


def complete_stage(stage_dir: Path, manifest: Manifest) -> None:
    """Makes ``work/artifact/`` the stage's result; killed at any point, none looks whole.

    The old manifest goes first: until the new one is written, the stage is incomplete.
    """
    (stage_dir / MANIFEST).unlink(missing_ok=True)
    target = stage_dir / ARTIFACT
    if target.exists():
        shutil.rmtree(target)
    (stage_dir / WORK / ARTIFACT).rename(target)
    write_manifest(stage_dir, manifest)
    discard_work(stage_dir)


def record_failure(
    stage_dir: Path, error: str, *, stopped: bool = False, certain: bool = True
) -> None:
    """Records why a start ended; an uncertain reason replaces none that is recorded already."""
    work = stage_dir / WORK
    work.mkdir(exist_ok=True)
    if certain or not (work / OUTCOME).exists():
        write_json(work / OUTCOME, {"stopped": stopped, "error": error})


def forget_outcome(stage_dir: Path) -> None:
    """Deletes what an earlier start said about its end."""
    work = stage_dir / WORK
    for file in (work / OUTCOME, *work.glob(STACKS.format("*"))):
        file.unlink(missing_ok=True)


def discard_work(stage_dir: Path) -> None:
    """Deletes unfinished work, first what makes it resumable: half of it must not be."""
    work = stage_dir / WORK
    (work / BEGUN).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
