"""Whether a stage must run, why, and what unfinished work would be lost if it did."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping

from launch.planned import PlannedStage
from recipes.core.errors import RecipeError
from recipes.core.fingerprint import result_settings
from recipes.core.manifest import WORK, Manifest, read_manifest
from recipes.core.run_state import InputRef

RUN, RESUME, SKIP = "run", "resume", "skip"
ADOPT = "adopt"
"""A job that was submitted before works on the stage, or will."""
FEW = 80
"""Characters of a reason; values that need more are not shown."""


def status(stage: PlannedStage, rerun: list[str], *, forced: bool) -> tuple[str, str]:
    """What to do with a stage, some of whose inputs ``rerun`` before it, and why.

    A forced run that was killed is resumed by the same command, so unfinished work of the stage's
    own fingerprint is kept even then. Without ``force`` an older complete result stands.
    """
    reason = "forced" if forced else _reason_to_run(stage, rerun)
    if reason is None:
        return SKIP, "complete"
    begun = stage.state().begun
    if begun is not None and begun.fingerprint == stage.fingerprint:
        return RESUME, "was interrupted"
    return RUN, reason


def require_nothing_lost(stage: PlannedStage) -> None:
    """Refuses to start a stage over when that deletes what an interrupted run of it has done."""
    begun = stage.state().begun
    done = stage.stage.progress(stage.directory / WORK)
    if stage.action != RUN or begun is None or done is None:
        return
    fields, others = _changes(stage, begun)
    changed = [f"{key} changed {old} → {new}" for key, (old, new) in fields.items()]
    changed += [f"its {what} changed" for what in others]
    back = [
        f"stages.{stage.name}.{key}={old if isinstance(old, str) else json.dumps(old)}"
        for key, (old, _) in fields.items()
    ]
    raise RecipeError(
        f"{stage.name} was interrupted at {done}, and since then {', '.join(changed)} "
        "(it resumes only with the settings, inputs and code it began with).",
        f"{'undo that' if others else f'set {shlex.join(back)}'} to go on, "
        f"or force=[{stage.name}] to start over",
    )


def _reason_to_run(stage: PlannedStage, rerun: list[str]) -> str | None:
    """Why a stage has no result to use; ``None`` when it has one."""
    manifest = read_manifest(stage.directory)
    if manifest is None:
        return "not run yet"
    if manifest.fingerprint != stage.fingerprint:
        return _difference(stage, manifest)
    if rerun:
        return f"after {', '.join(rerun)}"
    if made_anew := _made_anew(manifest, stage.inputs):
        return f"{', '.join(made_anew)} was made anew"
    return None


def _difference(stage: PlannedStage, manifest: Manifest) -> str:
    """Says in a few words why an existing result is out of date."""
    fields, others = _changes(stage, manifest)
    if not fields:
        return f"{others[0]} changed"
    key, (old, new) = next(iter(fields.items()))
    found = f"{key} {old} → {new}"
    if len(found) > FEW:
        found = f"{key} changed"
    return found if len(fields) == 1 else f"{found} and {len(fields) - 1} more"


def _changes(
    stage: PlannedStage, before: Manifest
) -> tuple[dict[str, tuple[object, object]], list[str]]:
    """Fields that differ from those of an earlier start, with both values; and what else does."""
    # A field that was not recorded is a new one, and comes with changed code.
    fields = {
        name: values
        for key, now in result_settings(stage.config).items()
        if key in before.config
        for name, values in _differing(key, before.config[key], now)
    }
    others = [
        f"input {name}"
        for name, ref in stage.inputs.items()
        if before.inputs.get(name) != ref.fingerprint
    ]
    if stage.code != before.code:
        others.append("code")
    others += [
        f"version of {name} ({before.libraries.get(name, 'unknown')} → {version})"
        for name, version in stage.libraries.items()
        if before.libraries.get(name) != version
    ]
    # The rest of what a fingerprint covers is files from outside the run.
    return fields, others if fields or others else ["source files"]


def _differing(name: str, old: object, new: object) -> Iterator[tuple[str, tuple[object, object]]]:
    """Fields with two values, down to single ones of mappings: ``budget.parameters``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.keys() == new.keys():
        for key in new:
            yield from _differing(f"{name}.{key}", old[key], new[key])
    elif old != new:
        yield name, (old, new)


def _made_anew(manifest: Manifest, inputs: Mapping[str, InputRef]) -> list[str]:
    """Inputs whose files are not those that were read, though their fingerprint is the same."""
    anew = []
    for name, ref in inputs.items():
        found, read = read_manifest(ref.directory), manifest.input_content.get(name)
        if found is not None and read is not None and found.content() != read:
            anew.append(name)
    return anew
