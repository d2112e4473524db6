"""Keeps stale results that the user accepts; refuses to replace expensive ones without ``force``.

A stale result was computed with other settings, inputs, code or libraries than those of the plan.
Interrupted work that the user accepts is resumed with the code that it was started with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from launch.planned import RESUME, RUN, SKIP, PlannedStage, compare, describe_changes
from recipes.core.errors import RecipeError
from recipes.core.manifest import Acceptance, Manifest, read_manifest, replaced_inputs
from recipes.core.run_state import content_of
from recipes.core.snapshot import snapshot_dir
from recipes.planning.training_cost import hours_text


def accept_result(stage: PlannedStage, *, named: bool) -> PlannedStage:
    """Plans to keep a stage's stale result, if this command or an earlier one accepts it.

    An earlier acceptance counts until settings, inputs, code or libraries change again. It also
    ends if an input was computed again with other content, or will be computed again.
    The returned stage has the kept result's fingerprint, because later stages use that result.

    Args:
        stage: The stage, as planned without acceptance.
        named: Whether the user's setting ``accept`` lists the stage.

    Raises:
        RecipeError: ``accept`` lists the stage, but the stage has neither a complete result nor
            interrupted work that can be resumed.
    """
    result = read_manifest(stage.directory)
    if named and result is None:
        return _resume(stage)
    if result is None or stage.action == SKIP:
        return stage
    acceptance = result.accepted
    content = {} if stage.rerun_inputs else content_of(stage.inputs)
    is_current = (
        acceptance is not None
        and acceptance.fingerprint == stage.fingerprint
        and not stage.rerun_inputs
        and not replaced_inputs(acceptance.input_content, content)
    )
    if not named and not is_current:
        return stage
    if acceptance is None or not is_current:
        acceptance = Acceptance(stage.fingerprint, stale_reasons(stage, result), content)
    return replace(
        stage,
        fingerprint=result.fingerprint,
        action=SKIP,
        reason=f"accepted although {', '.join(acceptance.reasons)}",
        accepted=acceptance,
        kept={**stage.kept, stage.name: acceptance.reasons},
    )


def _resume(stage: PlannedStage) -> PlannedStage:
    """Plans to resume a stage's interrupted work with the code that it was started with."""
    if stage.action == RESUME:
        return stage
    begun = stage.state().begun
    run_dir = stage.directory.parent
    if not (begun and begun.snapshot and snapshot_dir(run_dir, begun.snapshot).is_dir()):
        raise RecipeError(
            f"accept=[{stage.name}], but {stage.name} has no complete result.",
            f"leave {stage.name} out of accept",
        )
    changes = describe_changes(stage, begun)
    if compare(stage, begun) != ({}, ["code"]):
        raise RecipeError(
            f"accept=[{stage.name}], but {stage.name} was interrupted, and since then "
            f"{', '.join(changes)} (accept resumes it only if nothing but its code changed).",
            f"undo the other changes, or force=[{stage.name}] to start over",
        )
    return replace(
        stage,
        code=begun.code,
        fingerprint=begun.fingerprint,
        action=RESUME,
        reason="was interrupted; runs the code that it was started with",
        kept={**stage.kept, stage.name: changes},
        resumed=begun,
    )


def stale_reasons(stage: PlannedStage, result: Manifest) -> list[str]:
    """Returns why a complete result is stale: what changed and which inputs run again.

    If there is neither, returns the reason why the stage runs, such as a replaced input.
    """
    changed = describe_changes(stage, result) if result.fingerprint != stage.fingerprint else []
    return [*changed, *(f"{name} runs again" for name in stage.rerun_inputs)] or [stage.reason]


def new_acceptances(stages: Iterable[PlannedStage]) -> dict[Path, Acceptance | None]:
    """Returns the acceptances to record, by stage directory; ``None`` removes an acceptance."""
    return {
        stage.directory: stage.accepted
        for stage in stages
        if stage.action == SKIP
        and (result := read_manifest(stage.directory)) is not None
        and result.accepted != stage.accepted
    }


def require_confirmed(
    stages: Iterable[PlannedStage], force: Collection[str], confirm_above: float
) -> None:
    """Refuses to replace a result that cost more device-hours than ``confirm_above``.

    ``force`` must list each such stage, even a stage that reruns only because of an earlier stage.
    """
    expensive: dict[str, str] = {}
    for stage in stages:
        # A stage that is resumed was confirmed when it was started.
        result = read_manifest(stage.directory) if stage.action == RUN else None
        if result is None or stage.name in force or result.device_hours() <= confirm_above:
            continue
        why = ", ".join(stale_reasons(stage, result))
        hours = hours_text(result.device_hours())
        expensive[stage.name] = f"\n  {stage.name}, {hours} device-hours: {why}"
    if expensive:
        names = ",".join(expensive)
        raise RecipeError(
            "these complete results are stale, and each cost more than "
            f"confirm_above={confirm_above:g} device-hours:{''.join(expensive.values())}",
            f"add accept=[{names}] to keep them, or force=[{names}] to replace them",
        )
