"""``accept`` resumes interrupted work with the code that it was started with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from launch.accept import record_resumed
from launch.executors.local import may_fork
from recipes.core.manifest import MANIFEST, WORK, read_manifest, write_manifest
from recipes.core.run_state import BEGUN, discard_work
from recipes.core.snapshot import write_snapshot
from tests.support.manifests import edit_manifest
from tests.unit.conftest import stage_named
from tests.unit.launch.test_unfinished import actions_of, interrupt, refusal

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import Complete, MakePlan


def test_accepted_unfinished_work_is_resumed_with_the_code_that_it_was_started_with(
    plan: MakePlan, complete: Complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    complete(plan())
    (run_dir / "distill" / MANIFEST).unlink()
    before = stage_named(plan(), "distill")
    old_snapshot = before.code_dir
    write_snapshot(run_dir)
    interrupt(plan(), "distill")
    work = run_dir / "distill" / WORK
    begun = read_manifest(work, BEGUN)
    assert begun is not None
    # As if the old code had had neither the setting fp8_recipe nor resources other than devices.
    old_settings = {k: v for k, v in begun.config.items() if k != "fp8_recipe"}
    old_settings["resources"] = {"devices": 1}
    write_manifest(work, replace(begun, config=old_settings), BEGUN)
    monkeypatch.setattr("recipes.core.run_state.stage_code", lambda _: "new")
    monkeypatch.setattr("launch.planned.code_hash", lambda: "new")
    _, fix = refusal(plan)
    assert fix == (
        "set accept=[import_hf,prepare_data,score,prune,distill] to resume, "
        "or force=[distill] to start over"
    )
    accept = fix.split()[1]  # accept=[...]
    planned = plan(accept)
    stage = stage_named(planned, "distill")
    request = stage.request()
    assert actions_of(planned)["distill"][0] == "resume"
    assert stage.code_dir == old_snapshot
    assert stage_named(planned, "evaluate").code_dir != old_snapshot
    assert (request.fingerprint, request.code) == (before.fingerprint, before.code)
    assert request.snapshot == old_snapshot.name
    assert request.config == old_settings
    assert not may_fork(stage), "the fork server has imported other code"
    assert may_fork(before)
    # ``kept`` has the reasons why an accepted result is stale.
    assert stage_named(planned, "evaluate").kept["distill"] == ["its code changed"]
    _, fix = refusal(plan, "stages.distill.seed=1")
    assert fix.startswith(f"set stages.distill.seed=1234 and set {accept} to resume")
    assert "since then seed changed 1234 → 1" in refusal(plan, accept, "stages.distill.seed=1")[0]
    # Without its code, the work cannot be resumed.
    gone = old_snapshot.rename(run_dir / "gone")
    assert "distill has no complete result" in refusal(plan, accept)[0]
    gone.rename(old_snapshot)
    # The result of the resumed start stays accepted, although its code is the old one.
    record_resumed(stage)
    complete(replace(planned, stages=(stage,)))
    discard_work(stage.directory)
    for name in ("import_hf", "prepare_data", "score", "prune"):
        edit_manifest(run_dir / name, accepted=stage_named(planned, name).accepted)
    kept = stage_named(plan(), "distill")
    assert (kept.action, kept.reason) == ("skip", "accepted although its code changed")
    assert plan().acceptances[kept.directory] == kept.accepted == stage.accepted
    monkeypatch.setattr("recipes.core.run_state.stage_code", lambda _: "newer")
    assert stage_named(plan(), "distill").action == "run"


def test_accept_resumes_the_interrupted_work_rather_than_keeping_an_older_result(
    plan: MakePlan, complete: Complete, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``distill`` has a result with the default seed. Training with seed 1 was interrupted."""
    complete(plan())
    write_snapshot(plan().run_dir)
    interrupt(plan("stages.distill.seed=1"), "distill")
    monkeypatch.setattr("recipes.core.run_state.stage_code", lambda _: "new")
    _, fix = refusal(plan, "stages.distill.seed=1")
    accept = fix.split()[1]
    assert actions_of(plan("stages.distill.seed=1", accept))["distill"][0] == "resume"
    # With the settings of the result, ``accept`` keeps the result.
    assert stage_named(plan(accept), "distill").action == "skip"
