"""An expensive stale result stops the plan, until the user accepts it or forces its stage."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra.errors import HydraException

from launch.hydra_errors import explain
from launch.plan import Plan
from launch.run_status import read_statuses
from recipes.core.errors import RecipeError
from tests.support.manifests import edit_manifest
from tests.support.runs import STAGES, manifest_of
from tests.unit.conftest import RECIPE, Complete, Launch, MakePlan, stage_named, write_last_plan

OTHER_LR = "stages.distill.lr=2e-4"
SAME_LR = "stages.distill.lr=3e-4"
"""``SAME_LR`` is the learning rate of the result in ``run``. ``OTHER_LR`` makes it stale."""
LR_CHANGED = "lr changed 0.0003 → 0.0002"


@pytest.fixture
def run(plan: MakePlan, complete: Complete, tmp_path: Path) -> Path:
    """A complete run whose distillation took an hour on four devices: two nodes with two each."""
    planned = plan(SAME_LR)
    write_last_plan(planned)
    complete(planned)
    run = tmp_path / "run"
    config = manifest_of(run, "distill").config | {"resources": {"nodes": 2, "devices": 2}}
    edit_manifest(run / "distill", seconds=3600.0, config=config, devices=2)
    return run


def actions(plan: Plan) -> dict[str, str]:
    """Returns the action of each stage, such as ``run`` or ``skip``."""
    return {stage.name: stage.action for stage in plan.stages}


def refusal(plan: MakePlan, *overrides: str) -> str:
    """Returns the message of the error with which planning fails."""
    with pytest.raises((RecipeError, HydraException)) as caught:
        plan(*overrides)
    return explain(caught.value)


def test_stale_expensive_result_stops_the_plan_with_reasons_and_cost(
    run: Path, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(plan, OTHER_LR)
    assert f"\n  distill, 4 device-hours: {LR_CHANGED}\n" in message
    assert message.endswith("accept=[distill] to keep them, or force=[distill] to replace them")
    # Only results above the limit need a confirmation, and this one cost exactly 4 device-hours.
    assert actions(plan(OTHER_LR, "confirm_above=4"))["distill"] == "run"
    assert actions(plan(OTHER_LR, "force=[distill]"))["distill"] == "run"
    message = refusal(plan, SAME_LR, "stages.prune.target_hidden_size=448")
    assert "4 device-hours: its input student changed" in message
    assert "4 device-hours: prune runs again" in refusal(plan, SAME_LR, "force=[prune]")
    edit_manifest(run / "distill", seconds=3600.0 * 308.4)  # 1233.6 device-hours, shown rounded
    assert "distill, 1,230 device-hours" in refusal(plan, OTHER_LR)
    # As if another torch were installed.
    monkeypatch.setattr("launch.plan.result_versions", lambda **_: {"torch": "1.0"})
    assert re.search(r"its version of torch \(\S+ → 1.0\) changed", refusal(plan, SAME_LR))


def test_accepted_result_is_kept_and_used_by_later_stages(run: Path, plan: MakePlan) -> None:
    """Only ``export_hf`` and ``report`` run again: the model card and the report cite the
    acceptance.
    """
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
    # A dry run shows the acceptance, but does not record it.
    dry_run = launch(*arguments, OTHER_LR, "accept=[distill]", "dry_run=true")
    assert dry_run.returncode == 0, dry_run.stderr
    assert "accepted although lr changed" in dry_run.stdout
    assert manifest_of(run, "distill").accepted is None
    accepted = plan(OTHER_LR, "accept=[distill]")
    # All stages have results now, so the launcher only records the acceptance.
    complete(accepted, "export_hf", "report")
    done = launch(*arguments, OTHER_LR, "accept=[distill]")
    assert done.returncode == 0, done.stdout + done.stderr
    acceptance = manifest_of(run, "distill").accepted
    assert acceptance == stage_named(accepted, "distill").accepted
    assert acceptance is not None
    assert acceptance.reasons == [LR_CHANGED]
    # The recorded acceptance holds without the override, too.
    for accept in ((), ("accept=[distill]",)):
        again = launch(*arguments, OTHER_LR, *accept)
        assert "everything was complete, nothing ran" in again.stdout, again.stdout + again.stderr
    assert {stage.status for stage in read_statuses(run)} == {"complete"}
    # Any further change needs a new decision.
    assert "lr changed 0.0003 → 0.0001" in refusal(plan, "stages.distill.lr=1e-4")
    assert f"{LR_CHANGED}, prune runs again" in refusal(plan, OTHER_LR, "force=[prune]")
    # With the settings of the result, the acceptance is not needed. ``None`` removes it.
    assert plan(SAME_LR).acceptances == {run / "distill": None}
    complete(accepted, "prune", content="another result")
    assert f"{LR_CHANGED}, its input student changed" in refusal(plan, OTHER_LR)
    # If the plan of the acceptance also runs an input again, any new content of it is accepted.
    [acceptance] = plan(OTHER_LR, "accept=[distill]", "force=[prune]").acceptances.values()
    edit_manifest(run / "distill", accepted=acceptance)
    complete(accepted, "prune", content="a third result")
    assert actions(plan(OTHER_LR))["distill"] == "skip"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("accept=[nonsense]", "accept: there is no stage 'nonsense'"),
        ("accept=[plan]", "accept=[plan], but plan has no complete result"),
        ("confirm_above=nan", "invalid confirm_above=nan: must be"),
        ("confirm_above=-1", "invalid confirm_above=-1.0: must be 0 or more"),
        ("confirm_above=[1]", "confirm_above"),
        ("accept={a:b}", "accept"),
        ("accept=[distill] force=[prune,distill]", "force and accept both name distill."),
    ],
)
def test_invalid_values_of_accept_and_confirm_above_are_refused(
    plan: MakePlan, overrides: str, message: str
) -> None:
    assert message in refusal(plan, *overrides.split())
