"""Keeps stale results that the user accepts; refuses to replace expensive ones without ``force``.

A stale result was computed with other settings, inputs, code or libraries than those of the plan.
An acceptance is the user's decision to keep it, by listing its stage in the setting ``accept``.
``accept`` can also list a stage that was interrupted before its code changed. The stage then
resumes with the code that it was started with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from launch.planned import RESUME, RUN, SKIP, PlannedStage, compare, describe_changes
from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json
from recipes.core.manifest import (
    WORK,
    Acceptance,
    Manifest,
    read_manifest,
    replaced_inputs,
    write_manifest,
)
from recipes.core.run_state import content_of
from recipes.core.snapshot import snapshot_dir
from recipes.planning.training_cost import hours_text

RESUMED = "resumed.json"
"""File in a stage's directory with the acceptance of the result that a resumed start will write.

The start runs older code, which may not know acceptances. So the next plan writes the acceptance
into the manifest."""


def accept_result(stage: PlannedStage, *, named: bool) -> PlannedStage:
    """Plans to keep a stage's stale result, if this command or an earlier command accepts it.

    An earlier acceptance ends when settings, inputs, code or libraries change again. It also ends
    if an input was computed again with other content, or will be computed again in this plan.
    ``named`` says whether the user's setting ``accept`` lists the stage.

    Returns:
        To keep a stale result: the stage with the result's fingerprint, because later stages use
        this result. To resume interrupted work that ``accept`` lists: the stage with the action
        ``RESUME``. Otherwise: the unchanged stage.

    Raises:
        RecipeError: ``accept`` lists the stage, but the stage has neither a complete result nor
            interrupted work that can be resumed.
    """
    result = read_manifest(stage.directory)
    if named and (result is None or _can_resume(stage)):
        return _resume(stage)
    if result is None or stage.action == SKIP:
        return stage
    acceptance = result.accepted or _resumed_acceptance(stage.directory, result)
    input_content = _input_content(stage)
    if acceptance is not None and (
        acceptance.fingerprint != stage.fingerprint
        or stage.rerun_inputs
        or replaced_inputs(acceptance.input_content, input_content)
    ):
        acceptance = None  # it has ended
    if acceptance is None:
        if not named:
            return stage
        acceptance = Acceptance(stage.fingerprint, stale_reasons(stage, result), input_content)
    return replace(
        stage,
        fingerprint=result.fingerprint,
        action=SKIP,
        reason=f"accepted although {', '.join(acceptance.reasons)}",
        accepted=acceptance,
        kept={**stage.kept, stage.name: acceptance.reasons},
    )


def _input_content(stage: PlannedStage) -> dict[str, str]:
    """Returns the content hash of each input; empty if an input's content may still change."""
    return {} if stage.rerun_inputs else content_of(stage.inputs)


def _can_resume(stage: PlannedStage) -> bool:
    """Returns whether a stage has interrupted work that ``_resume`` accepts."""
    begun, work = stage.state().begun, stage.directory / WORK
    return (
        begun is not None
        and stage.definition.progress(work) is not None
        and _has_snapshot(stage, begun)
        and _only_code_changed(stage, begun)
    )


def _only_code_changed(stage: PlannedStage, begun: Manifest) -> bool:
    """Returns whether nothing but the stage's code has changed since an interrupted start."""
    return compare(stage, begun) == ({}, ["code"])


def _has_snapshot(stage: PlannedStage, begun: Manifest) -> bool:
    """Returns whether the run still has the code snapshot of an interrupted start."""
    run_dir, snapshot = stage.directory.parent, begun.snapshot
    return snapshot is not None and snapshot_dir(run_dir, snapshot).is_dir()


def _resume(stage: PlannedStage) -> PlannedStage:
    """Plans to resume a stage's interrupted work with the code that it was started with.

    Raises:
        RecipeError: There is no interrupted work, the run no longer has the code of this work, or
            more than the code has changed.
    """
    if stage.action == RESUME:  # with the current code, which has not changed
        return stage
    interrupted = stage.state().begun
    if interrupted is None or not _has_snapshot(stage, interrupted):
        raise RecipeError(
            f"accept=[{stage.name}], but {stage.name} has no complete result and no interrupted "
            "work that can be resumed.",
            f"leave {stage.name} out of accept",
        )
    changes = describe_changes(stage, interrupted)
    if not _only_code_changed(stage, interrupted):
        raise RecipeError(
            f"accept=[{stage.name}], but {stage.name} was interrupted, and since then "
            f"{', '.join(changes)} (accept resumes it only if nothing but its code changed).",
            f"undo the other changes, or force=[{stage.name}] to start over",
        )
    return replace(
        stage,
        code=interrupted.code,
        fingerprint=interrupted.fingerprint,
        action=RESUME,
        reason="was interrupted; runs the code that it was started with",
        accepted=Acceptance(stage.fingerprint, changes, _input_content(stage)),
        kept={**stage.kept, stage.name: changes},
        resumed=interrupted,
    )


def stale_reasons(stage: PlannedStage, result: Manifest) -> list[str]:
    """Returns why a complete result is stale: what changed and which inputs run again."""
    changes = describe_changes(stage, result) if result.fingerprint != stage.fingerprint else []
    reasons = [*changes, *(f"{name} runs again" for name in stage.rerun_inputs)]
    return reasons or [stage.reason]  # for example, an input was replaced


def new_acceptances(stages: Iterable[PlannedStage]) -> dict[Path, Acceptance | None]:
    """Returns, by stage directory, the acceptances that differ from those in the manifests.

    ``None`` removes the acceptance from the manifest.
    """
    return {
        stage.directory: stage.accepted
        for stage in stages
        if stage.action == SKIP
        and (result := read_manifest(stage.directory)) is not None
        and result.accepted != stage.accepted
    }


def record_acceptance(stage_dir: Path, acceptance: Acceptance | None) -> None:
    """Writes an acceptance to a complete stage's manifest; ``None`` removes the acceptance."""
    if (manifest := read_manifest(stage_dir)) is not None:
        write_manifest(stage_dir, replace(manifest, accepted=acceptance))
        (stage_dir / RESUMED).unlink(missing_ok=True)


def record_resumed(stage: PlannedStage) -> None:
    """Writes ``RESUMED`` if the stage will be resumed with older code."""
    if stage.resumed and stage.accepted:
        record = {"result": stage.fingerprint, "acceptance": asdict(stage.accepted)}
        write_json(stage.directory / RESUMED, record)


def _resumed_acceptance(stage_dir: Path, result: Manifest) -> Acceptance | None:
    """Returns the acceptance in ``RESUMED``; ``None`` if there is none for this result."""
    file = stage_dir / RESUMED
    record = read_json(file) if file.is_file() else {}
    is_of_result = record.get("result") == result.fingerprint
    return Acceptance(**record["acceptance"]) if is_of_result else None


def require_confirmed(
    stages: Iterable[PlannedStage], force: Collection[str], confirm_above: float
) -> None:
    """Refuses to replace a result that cost more than ``confirm_above`` device-hours.

    Does not refuse stages that ``force`` lists. The user must also list stages that run again only
    because an earlier stage runs again.
    """
    expensive: dict[str, str] = {}
    for stage in stages:
        # A stage that is resumed was confirmed when it was started.
        result = read_manifest(stage.directory) if stage.action == RUN else None
        if result is None or stage.name in force or result.device_hours() <= confirm_above:
            continue
        cost = f"{hours_text(result.device_hours())} device-hours"
        why = ", ".join(stale_reasons(stage, result))
        expensive[stage.name] = f"\n  {stage.name}, {cost}: {why}"
    if expensive:
        names = ",".join(expensive)
        raise RecipeError(
            "these complete results are stale, and each cost more than "
            f"confirm_above={confirm_above:g} device-hours:{''.join(expensive.values())}",
            f"add accept=[{names}] to keep them, or force=[{names}] to replace them",
        )
