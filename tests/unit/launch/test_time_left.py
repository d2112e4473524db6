"""The remaining time of a stage and of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from launch.progress import (
    OVERHEAD_SECONDS,
    format_seconds,
    remaining_run_seconds,
    remaining_seconds,
    run_estimate,
)
from launch.run_status import read_statuses, time_left
from recipes.core.metrics import METRICS, MetricsLog
from recipes.core.run_state import begin_work, read_request
from tests.support.manifests import edit_manifest, unfinished_manifest
from tests.unit.conftest import stage_named, write_last_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from launch.plan import Plan
    from recipes.core.metrics import Record

STAGES_BEFORE = ("plan", "import_hf", "prepare_data", "score", "prune")
"""Stages before ``distill``. Of these, only ``score`` has a planned time."""
SCORE, DISTILL, EVALUATE = 90.0, 390.0, 40.0
"""Seconds of these stages in ``plan_result`` of ``tests.support.results``.

The launcher expects a stage to take ``OVERHEAD_SECONDS`` more. It expects no more than
``OVERHEAD_SECONDS`` of the other stages.
"""
AFTER_SECONDS = EVALUATE + 3 * OVERHEAD_SECONDS
"""Expected seconds of evaluate, export_hf and report, which follow the distillation."""


def progress_records(
    task: str, *done: int, total: int = 10, step_seconds: float = 7.0
) -> list[Record]:
    """Returns a progress record for each number of completed steps in ``done``.

    The task starts at second 0, and each step takes ``step_seconds``.
    """
    return [{"time": step_seconds * n, "task": task, "done": n, "total": total} for n in done]


def test_remaining_time_follows_from_the_speed_of_the_current_task() -> None:
    assert remaining_seconds(progress_records("train", 2)) is None, "one record shows no speed"
    assert remaining_seconds(progress_records("train", 2, 3)) == 49  # 7 steps of 7 seconds remain
    new_task = [*progress_records("train", 2, 3), *progress_records("validate", 1)]
    assert remaining_seconds(new_task) is None
    assert remaining_seconds(progress_records("train", 9, 10)) == 0
    assert format_seconds(3725.4) == "1:02:05"


def test_planned_seconds_are_scaled_by_the_pace_of_complete_stages() -> None:
    planned = {"score": SCORE, "distill": DISTILL}
    remaining = {"distill": None, "report": None}  # None: no progress yet
    expected = DISTILL + 2 * OVERHEAD_SECONDS
    assert remaining_run_seconds(planned, {}, remaining) == expected
    spent = {"score": 250.0}
    pace = 250 / (SCORE + OVERHEAD_SECONDS)
    run_seconds = remaining_run_seconds(planned, spent, remaining)
    assert run_seconds == pytest.approx(pace * expected)
    assert remaining_run_seconds(planned, spent, {}) is None, "the run is complete"
    assert remaining_run_seconds({}, spent, remaining) is None, "no times were planned"


@pytest.fixture
def completed_pace(plan: Callable[..., Plan], complete: Callable[..., None]) -> float:
    """Completes ``STAGES_BEFORE`` in 56 seconds each; returns their measured / expected time."""
    planned = plan()
    complete(planned, *STAGES_BEFORE)
    for stage in planned.stages[: len(STAGES_BEFORE)]:
        edit_manifest(stage.directory, seconds=56.0)
    return len(STAGES_BEFORE) * 56 / (SCORE + len(STAGES_BEFORE) * OVERHEAD_SECONDS)


def test_estimate_of_a_run_includes_its_later_stages(
    plan: Callable[..., Plan], completed_pace: float
) -> None:
    planned = plan()
    distill = stage_named(planned, "distill")
    # 33 seconds of the running stage remain.
    assert run_estimate(planned, distill)(33) == pytest.approx(33 + completed_pace * AFTER_SECONDS)
    assert run_estimate(planned, planned.stages[-1])(33) == 33
    (planned.run_dir / "plan" / "manifest.json").unlink()
    assert run_estimate(planned, distill)(33) is None


def test_progress_of_unfinished_work_replaces_its_planned_time(
    plan: Callable[..., Plan], completed_pace: float
) -> None:
    planned = plan()
    write_last_plan(planned)
    distill = planned.run_dir / "distill"
    expected = completed_pace * (DISTILL + OVERHEAD_SECONDS + AFTER_SECONDS)
    assert time_left(planned.run_dir, read_statuses(planned.run_dir)) == pytest.approx(expected)
    write_progress(distill)  # without unfinished work, progress records do not count
    assert time_left(planned.run_dir, read_statuses(planned.run_dir)) == pytest.approx(expected)
    begin_work(distill, unfinished_manifest(read_request(distill)))  # deletes the old records
    write_progress(distill)
    statuses = read_statuses(planned.run_dir)
    # 7 steps of 7 seconds remain in the distillation.
    expected = 49 + completed_pace * AFTER_SECONDS
    assert time_left(planned.run_dir, statuses) == pytest.approx(expected)
    complete = [stage for stage in statuses if stage.result]
    assert [stage.name for stage in complete] == list(STAGES_BEFORE)
    assert time_left(planned.run_dir, complete) is None


def write_progress(directory: Path) -> None:
    """Logs that steps 2 and 3 of 10 of the distillation are complete."""
    log = MetricsLog(directory / METRICS)
    for record in progress_records("distill", 2, 3):
        log.log(**record)
