"""A stage as planned: its resolved settings and inputs, whether it must run, and why."""

from __future__ import annotations

import importlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from launch import lock
from launch.slurm_queue import active_jobs
from recipes.core.errors import RecipeError, require_known
from recipes.core.files import REPO_ROOT
from recipes.core.fingerprint import module_of, with_absolute_path
from recipes.core.manifest import WORK, Acceptance, Manifest, read_manifest, replaced_inputs
from recipes.core.run_state import (
    InputRef,
    Request,
    StageState,
    Status,
    content_of,
    read_last_plan,
    stage_state,
)
from recipes.core.snapshot import code_hash, snapshot_dir
from recipes.core.stage import StageConfig
from recipes.core.versions import git_sha
from recipes.planning.chain import Chain
from recipes.planning.workload import Workload
from recipes.stages.contract import Stage

RUN, RESUME, SKIP = "run", "resume", "skip"
ADOPT = "adopt"
"""Action of a stage whose Slurm job, which an earlier command submitted, runs or waits."""
REASON_CHARACTERS = 80
"""Maximum length of a reason with a setting's values; a longer reason omits the values."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a plan."""

    name: str
    directory: Path
    config: StageConfig
    inputs: Mapping[str, InputRef]
    """Directories and fingerprints of the inputs, by input name such as ``teacher``."""
    code: str
    """Fingerprint of the stage's code."""
    libraries: Mapping[str, str]
    """Versions of the libraries that are in the fingerprint."""
    fingerprint: str
    """Hash of all that the result depends on: settings, inputs, code, libraries, other files."""
    action: str
    """``RUN``, ``RESUME``, ``SKIP`` or ``ADOPT``."""
    reason: str
    """Why the plan has this action, such as "not run yet"."""
    chain: Chain = field(repr=False, compare=False)
    """All stages of the recipe, and the hardware."""
    rerun_inputs: tuple[str, ...] = ()
    """Names of the stages in ``inputs`` that will run in this plan."""
    accepted: Acceptance | None = None
    """The user's decision to keep the stage's stale result."""
    kept: Mapping[str, list[str]] = field(default_factory=dict)
    """Why accepted results are stale, by stage: of this stage and of all that it depends on."""
    resumed: Manifest | None = None
    """The interrupted start to resume with its own code; ``None`` to run this checkout's code."""

    @property
    def definition(self) -> Stage[Any]:
        """The constant ``STAGE`` of the stage's module."""
        return stage_of(self.config)

    @property
    def module(self) -> str:
        """The module that the stage's process runs."""
        return module_of(self.config.stage)

    @property
    def workload(self) -> Workload | None:
        """The stage's training, or the teacher's forward passes if the stage caches logits."""
        return self.chain.workloads.get(self.name)

    @property
    def image(self) -> str | None:
        """The stage's container image; ``None`` without a container."""
        image = self.definition.image(self.config, self.chain)
        # Pyxis would take a relative path for the name of an image to import.
        return os.path.abspath(image) if image and image.endswith(".sqsh") else image

    @property
    def needs_gpu(self) -> bool:
        """Whether the stage uses GPUs if the hardware has GPUs."""
        return self.definition.needs_gpu(self.config, self.chain)

    @property
    def uses_gpu(self) -> bool:
        """Whether the stage runs on GPUs."""
        return self.needs_gpu and self.chain.hardware.on_gpu

    @property
    def devices(self) -> int:
        """Devices per node that the stage and the processes that it starts use."""
        return self.definition.devices(self.config, self.chain)

    @property
    def result(self) -> Manifest | None:
        """The stage's complete result with the planned fingerprint; ``None`` if there is none."""
        state = self.state()
        return state.result if state.status is Status.COMPLETE else None

    def state(self) -> StageState:
        """Reads the stage's state; only a result with the planned fingerprint makes it complete."""
        return stage_state(self.directory, self.fingerprint)

    @property
    def code_dir(self) -> Path:
        """The snapshot of the code that the stage's process runs."""
        old_snapshot = self.resumed.snapshot if self.resumed else None
        return snapshot_dir(self.directory.parent, old_snapshot or code_hash())

    def request(self) -> Request:
        """Returns the content of the stage's ``config.yaml``, from which its process starts."""
        # A skipped or resumed stage keeps the snapshot and commit of its earlier start.
        earlier = self.result if self.action == SKIP else self.resumed
        return Request(
            name=self.name,
            fingerprint=self.fingerprint,
            code=self.code,
            inputs=self.inputs,
            config=self._settings(),
            libraries=self.libraries,
            kept=self.kept,
            snapshot=earlier.snapshot if earlier else code_hash(),
            git_sha=earlier.git_sha if earlier else git_sha(),
            devices=self.devices,
        )

    def _settings(self) -> dict[str, Any]:
        """Returns the settings, without those that the older code of a resumed start lacks."""
        settings = asdict(self.config)
        if self.resumed is None:
            return settings
        old_settings = self.resumed.config
        settings["resources"] = {
            key: value
            for key, value in settings["resources"].items()
            if key in old_settings["resources"]
        }
        return {key: value for key, value in settings.items() if key in old_settings}


def stage_names() -> list[str]:
    """Returns the names of all stage modules, each of which has a folder in ``conf/stage``."""
    return sorted(folder.name for folder in (REPO_ROOT / "conf" / "stage").iterdir())


def stage_of(config: StageConfig) -> Stage[Any]:
    """Returns the definition of the stage whose settings are ``config``."""
    return load_stage(config.stage)


@cache
def load_stage(name: str) -> Stage[Any]:
    """Imports a stage's module, which does not import torch; refuses an unknown name."""
    require_known(name, stage_names(), f"there is no kind of stage '{name}'")
    stage: Stage[Any] = importlib.import_module(module_of(name)).STAGE
    return stage


def choose_action(stage: PlannedStage, *, forced: bool, selected: bool) -> tuple[str, str]:
    """Returns the action for a stage, and why. The stage's own ``action`` is only a placeholder.

    ``forced`` says whether the setting ``force`` lists the stage, ``selected`` whether the setting
    ``only`` includes the stage.
    """
    reason = "forced" if forced else _reason_to_run(stage)
    # A report or model card lists the accepted stale results, so a changed list makes it outdated.
    if reason is None and selected and stage.definition.names_accepted_results:
        result = read_manifest(stage.directory)
        if result is not None and result.kept != stage.kept:
            reason = "other results were accepted"
    if reason is None:
        return SKIP, "complete"
    begun = stage.state().begun
    if begun is None or begun.fingerprint != stage.fingerprint or _replaced_inputs(stage, begun):
        return RUN, reason
    # A forced stage resumes, too: an earlier command with this ``force`` has started the work.
    if stage.rerun_inputs:
        names = ", ".join(stage.rerun_inputs)
        return RESUME, f"was interrupted; starts over if {names} gives another result"
    return RESUME, "was interrupted"


def replaced_results(run_dir: Path) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Returns which stages an interrupted command with ``force`` has run, and which it has not.

    Returns:
        Two dicts that map stages to the start times of their old results. The first has the stages
        with a newer result, the second the stages without one. Once all stages have a newer result,
        the command is complete. Then both dicts are empty, so a new ``force`` runs its stages.
    """
    last_plan = read_last_plan(run_dir)
    old_starts = last_plan.replaces if last_plan else {}
    replaced = {
        name: old_start
        for name, old_start in old_starts.items()
        if start_of(run_dir / name) not in (None, old_start)  # ``None``: no result
    }
    unfinished = {name: start for name, start in old_starts.items() if name not in replaced}
    return (replaced, unfinished) if unfinished else ({}, {})


def start_of(stage_dir: Path) -> str | None:
    """Returns the start time that identifies a stage's result; ``None`` without a result."""
    result = read_manifest(stage_dir)
    return result.started_at if result else None


def require_no_lost_work(stage: PlannedStage, planned: Mapping[str, PlannedStage]) -> None:
    """Refuses to start a stage if it would delete an earlier start's progress.

    ``planned`` has the earlier stages of the plan, by name.
    """
    begun = stage.state().begun
    progress = stage.definition.progress(stage.directory / WORK)
    if begun is None or progress is None or stage.action != RUN:
        return
    changes = ", ".join(describe_changes(stage, begun))
    run_dir = stage.directory.parent
    holder = lock.read_holder(run_dir)
    if (holder and holder.stage == stage.name) or stage.name in active_jobs(run_dir):
        raise RecipeError(
            f"{stage.name} is running, at {progress}, and since its start {changes}.",
            f"wait for it, or: python launch/run.py cancel run_dir={run_dir}",
        )
    changed_settings, other_changes = compare(stage, begun)
    old_values = [
        f"stages.{stage.name}.{key}={old if isinstance(old, str) else json.dumps(old)}"
        for key, (old, _) in changed_settings.items()
    ]
    fixes = [f"set {shlex.join(old_values)}"] if old_values else []
    if other_changes:
        to_accept = [*_stale_results(stage, planned), stage.name]
        # An accepted stale result keeps its fingerprint, so the input no longer counts as changed.
        inputs = stage.config.inputs
        acceptable = {f"input {key}" for key in inputs if inputs[key] in to_accept}
        can_accept = set(other_changes) <= {"code", *acceptable}
        fixes.append(f"set accept=[{','.join(to_accept)}]" if can_accept else "undo that")
    raise RecipeError(
        f"{stage.name} was interrupted at {progress}, and since then {changes} "
        "(it resumes only with the settings, inputs and code that it was started with).",
        f"{' and '.join(fixes)} to resume, or force=[{stage.name}] to start over",
    )


def require_same_optimizers(stage: PlannedStage) -> None:
    """Refuses to resume a training if only the old or only the new layout splits experts.

    If experts are split over ranks, Megatron-Core has a second optimizer for the experts. The state
    of one optimizer cannot be loaded into two, or of two into one.
    """
    begun, work = stage.state().begun, stage.directory / WORK
    if stage.action != RESUME or begun is None or stage.definition.progress(work) is None:
        return
    setting = "expert_model_parallel_size"
    old, new = begun.config.get(setting, 1), getattr(stage.config, setting, 1)
    trains = stage.workload is not None and stage.workload.trained is not None
    if trains and (old > 1) != (new > 1):
        raise RecipeError(
            f"{stage.name} was interrupted with {setting}={old}, and cannot resume with {new}: "
            "Megatron-Core has a second optimizer for experts only if the size is above 1.",
            f"set stages.{stage.name}.{setting}={old}, or delete {work} to start over",
        )


def _stale_results(stage: PlannedStage, planned: Mapping[str, PlannedStage]) -> list[str]:
    """Returns the stages whose stale results a stage depends on, in the plan's order."""
    names: set[str] = set()
    for name in stage.rerun_inputs:
        # If a stage has a result and runs nevertheless, the result is stale.
        if planned[name].action == RUN and read_manifest(planned[name].directory) is not None:
            names |= {name, *_stale_results(planned[name], planned)}
    return [name for name in planned if name in names]


def _reason_to_run(stage: PlannedStage) -> str | None:
    """Returns why a stage without ``force`` must run; ``None`` if its result is up to date."""
    manifest = read_manifest(stage.directory)
    if manifest is None:
        return "not run yet"
    if manifest.fingerprint != stage.fingerprint:
        changed_settings, other_changes = compare(stage, manifest)
        if not changed_settings:
            return f"{other_changes[0]} changed"
        [(key, (old, new)), *more_settings] = changed_settings.items()
        reason = f"{key} {old} → {new}"
        if len(reason) > REASON_CHARACTERS:
            reason = f"{key} changed"
        return f"{reason} and {len(more_settings)} more" if more_settings else reason
    if stage.rerun_inputs:
        return f"after {', '.join(stage.rerun_inputs)}"
    replaced = _replaced_inputs(stage, manifest)
    return f"input {', '.join(replaced)} was replaced" if replaced else None


def _replaced_inputs(stage: PlannedStage, earlier_start: Manifest) -> list[str]:
    """Returns the names of inputs that have other content than at an earlier start."""
    if stage.rerun_inputs:  # the new content of these is not known yet
        return []
    return replaced_inputs(earlier_start.input_content, content_of(stage.inputs))


def describe_changes(stage: PlannedStage, earlier_start: Manifest) -> list[str]:
    """Returns the changes since an earlier start of a stage, such as "its code changed"."""
    changed_settings, other_changes = compare(stage, earlier_start)
    changes = [f"{key} changed {old} → {new}" for key, (old, new) in changed_settings.items()]
    return changes + [f"its {what} changed" for what in other_changes]


def compare(
    stage: PlannedStage, earlier_start: Manifest
) -> tuple[dict[str, tuple[object, object]], list[str]]:
    """Compares a stage with an earlier start.

    Returns:
        The old and the new value of each changed setting, and the names of other changes, such as
        "code" or "input model".
    """
    changed_settings = dict(_differences("", earlier_start.config, stage.config))
    replaced = _replaced_inputs(stage, earlier_start)
    fingerprints = {name: ref.fingerprint for name, ref in stage.inputs.items()}
    other_changes = [
        f"input {name}"
        for name in {**fingerprints, **earlier_start.inputs}
        if name in replaced or earlier_start.inputs.get(name) != fingerprints.get(name)
    ]
    if stage.code != earlier_start.code:
        other_changes.append("code")
    old, new = earlier_start.libraries, stage.libraries
    other_changes += [
        f"version of {name} ({old.get(name, 'unknown')} → {new.get(name, 'unknown')})"
        for name in {**new, **old}
        if old.get(name) != new.get(name)
    ]
    # The manifest does not record files from outside the run, but the fingerprint covers them.
    if not changed_settings and not other_changes:
        other_changes = ["files from outside the run"]
    return changed_settings, other_changes


def _differences(
    name: str, old: object, new: object
) -> Iterator[tuple[str, tuple[object, object]]]:
    """Yields the name of each setting that differs, with its old and new value.

    ``name`` is the dotted name of the compared values, empty for all settings of a stage. Mappings
    with equal keys are compared key by key. Two types of settings are not compared: resources, and
    settings that the earlier start did not record. The latter are new, so the code changed, too.
    """
    if is_dataclass(new) and isinstance(old, Mapping):
        names = [spec.name for spec in fields(new) if not spec.metadata.get("resource")]
        new = {key: getattr(new, key) for key in names if key in old}
        old = {key: old[key] for key in new}
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.keys() == new.keys():
        for key in new:
            yield from _differences(f"{name}.{key}" if name else key, old[key], new[key])
    elif with_absolute_path(old) != with_absolute_path(new):
        yield name, (old, new)
