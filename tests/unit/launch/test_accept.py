"""A stale result that was expensive is replaced or kept only if the user says so."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from launch.plan import Plan
from launch.run_status import read_statuses
from recipes.core.errors import RecipeError
from tests.support.manifests import edit_manifest
from tests.support.runs import STAGES, manifest_of
from tests.unit.conftest import RECIPE, stage_named, write_last_plan

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import Complete, Launch, MakePlan

OTHER_LR = "stages.distill.lr=2e-4"
SAME_LR = "stages.distill.lr=3e-4"
LR_CHANGED = "lr changed 0.0003 → 0.0002"


@pytest.fixture
def run(plan: MakePlan, complete: Complete, tmp_path: Path) -> Path:
    """A complete run whose distillation took an hour on four devices."""
    planned = plan(SAME_LR)
    write_last_plan(planned)
    complete(planned)
    run = tmp_path / "run"
    config = manifest_of(run, "distill").config | {"resources": {"nodes": 2, "devices": 2}}
    edit_manifest(run / "distill", seconds=3600.0, config=config, devices=2)
    return run


def actions(plan: Plan) -> dict[str, str]:
    return {stage.name: stage.action for stage in plan.stages}


def refusal(plan: MakePlan, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        plan(*overrides)
    return str(caught.value)


def test_stale_expensive_result_stops_the_plan_with_reasons_and_cost(
    run: Path, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(plan, OTHER_LR)
    assert f"\n  distill, 4 device-hours: {LR_CHANGED}\n" in message
    assert message.endswith("accept=[distill] to keep them, or force=[distill] to replace them")
    assert actions(plan(OTHER_LR, "confirm_above=4"))["distill"] == "run"
    assert actions(plan(OTHER_LR, "force=[distill]"))["distill"] == "run"
    message = refusal(plan, SAME_LR, "stages.prune.target_hidden_size=448")
    assert "4 device-hours: its input student changed" in message
    assert "4 device-hours: prune runs again" in refusal(plan, SAME_LR, "force=[prune]")
    edit_manifest(run / "distill", seconds=3600.0 * 308.4)
    assert "distill, 1,230 device-hours" in refusal(plan, OTHER_LR)
    monkeypatch.setattr("launch.plan.result_versions", lambda *_: {"torch": "1.0"})
    assert re.search(r"its version of torch \(\S+ → 1.0\) changed", refusal(plan, SAME_LR))


def test_accepted_result_feeds_later_stages_as_it_is(run: Path, plan: MakePlan) -> None:
    """Only the model card and the report are written again, because they cite the acceptance."""
    planned = plan(OTHER_LR, "accept=[distill]")
    assert actions(planned) == dict.fromkeys(STAGES, "skip") | {"export_hf": "run", "report": "run"}
    distill = stage_named(planned, "distill")
    assert distill.reason == f"accepted although {LR_CHANGED}"
    assert distill.fingerprint == manifest_of(run, "distill").fingerprint
    assert actions(plan(OTHER_LR, "accept=[distill]", "only=[report]")) == {"report": "run"}
    assert actions(plan(OTHER_LR, "accept=distill", "force=[evaluate]"))["evaluate"] == "run"


def test_acceptance_is_recorded_until_the_stage_changes_again(
    run: Path, launch: Launch, plan: MakePlan, complete: Complete
) -> None:
    arguments = (RECIPE, f"run_dir={run}", "tasks=null", "engine=null", "skip_rules=[disk]")
    dry_run = launch(*arguments, OTHER_LR, "accept=[distill]", "dry_run=true")
    assert dry_run.returncode == 0, dry_run.stderr
    assert "accepted although lr changed" in dry_run.stdout
    assert manifest_of(run, "distill").accepted is None
    accepted = plan(OTHER_LR, "accept=[distill]")
    complete(accepted, "export_hf", "report")
    done = launch(*arguments, OTHER_LR, "accept=[distill]")
    assert done.returncode == 0, done.stdout + done.stderr
    acceptance = manifest_of(run, "distill").accepted
    assert acceptance == stage_named(accepted, "distill").accepted
    assert acceptance is not None
    assert acceptance.reasons == [LR_CHANGED]
    for accept in ((), ("accept=[distill]",)):
        again = launch(*arguments, OTHER_LR, *accept)
        assert "everything was complete, nothing ran" in again.stdout, again.stdout + again.stderr
    assert {stage.status for stage in read_statuses(run)} == {"complete"}
    assert "lr changed 0.0003 → 0.0001" in refusal(plan, "stages.distill.lr=1e-4")
    assert f"{LR_CHANGED}, prune runs again" in refusal(plan, OTHER_LR, "force=[prune]")
    # With the settings of the result, the acceptance is not needed and is removed.
    assert plan(SAME_LR).acceptances == {run / "distill": None}
    complete(accepted, "prune", content="another result")
    assert f"{LR_CHANGED}, its input student changed" in refusal(plan, OTHER_LR)
    # Of an input that runs again after the acceptance, the content is accepted as well.
    [acceptance] = plan(OTHER_LR, "accept=[distill]", "force=[prune]").acceptances.values()
    edit_manifest(run / "distill", accepted=acceptance)
    complete(accepted, "prune", content="a third result")
    assert actions(plan(OTHER_LR))["distill"] == "skip"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("accept=[nonsense]", "accept: there is no stage 'nonsense'"),
        ("accept=[plan]", "accept=[plan], but plan has no complete result"),
        ("confirm_above=nan", "invalid confirm_above=nan: must be"),
        ("confirm_above=-1", "invalid confirm_above=-1.0: must be 0 or more"),
        ("confirm_above=[1]", "confirm_above"),
        ("accept={a: b}", "accept"),
    ],
)
def test_bad_values_are_refused(run: Path, launch: Launch, override: str, message: str) -> None:
    (run / "plan" / "manifest.json").unlink()
    done = launch(RECIPE, f"run_dir={run}", "tasks=null", "engine=null", override)
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1
    assert message in done.stderr


def test_a_stage_is_not_both_forced_and_accepted(run: Path, plan: MakePlan) -> None:
    message = refusal(plan, "accept=[distill]", "force=[prune,distill]")
    assert message.startswith("force and accept both name distill.")
