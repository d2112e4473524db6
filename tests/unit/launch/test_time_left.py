"""What is left of a stage and of a run, in arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from launch.run_status import read_statuses, time_left
from launch.time_left import BESIDE, in_words, of_run, run_left, seconds_left
from recipes.core.manifest import read_manifest, write_manifest
from recipes.core.metrics import METRICS, MetricsLog
from recipes.core.run_state import begin_work, read_request
from tests.support.manifests import begun
from tests.unit.conftest import record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from launch.plan import Plan
    from recipes.core.metrics import Record

BEFORE = ("plan", "import_hf", "prepare_data", "score", "prune")
"""Stages before the distillation."""
AFTER = 40 + 3 * BESIDE
"""Seconds of evaluate, export_hf and report, by the plan."""


def steps(task: str, *done: int, total: int = 10, each: float = 7.0) -> list[Record]:
    return [{"time": each * n, "task": task, "done": n, "total": total} for n in done]


def test_a_task_goes_on_at_its_own_speed() -> None:
    assert seconds_left(steps("train", 2)) is None
    assert seconds_left(steps("train", 2, 3)) == 49
    assert seconds_left([*steps("train", 2, 3), *steps("validate", 1)]) is None
    assert seconds_left(steps("train", 9, 10)) == 0
    assert in_words(3725.4) == "1:02:05"


def test_stages_take_what_is_planned_at_the_pace_of_those_that_ended() -> None:
    planned, ahead = {"score": 90.0, "distill": 390.0}, dict.fromkeys(("distill", "report"))
    assert run_left(planned, {}, ahead) == 390 + 2 * BESIDE
    pace = 250 / (90 + BESIDE)
    left = run_left(planned, {"score": 250.0}, ahead)
    assert left == pytest.approx(pace * (390 + 2 * BESIDE))
    assert run_left(planned, {"score": 250.0}, {}) is None
    assert run_left({}, {"score": 250.0}, ahead) is None


@pytest.fixture
def pace(plan: Callable[..., Plan], complete: Callable[..., None]) -> float:
    """Of a run whose next stage is the distillation."""
    made = plan()
    complete(made, *BEFORE)
    for stage in made.stages[: len(BEFORE)]:
        manifest = read_manifest(stage.directory)
        assert manifest is not None
        write_manifest(stage.directory, replace(manifest, seconds=56.0))
    return len(BEFORE) * 56 / (90 + len(BEFORE) * BESIDE)


def test_what_follows_a_stage_is_added(plan: Callable[..., Plan], pace: float) -> None:
    made = plan()
    [distill] = [stage for stage in made.stages if stage.name == "distill"]
    assert of_run(made, distill)(33) == pytest.approx(33 + pace * AFTER)
    assert of_run(made, made.stages[-1])(33) == 33
    (made.run_dir / "plan" / "manifest.json").unlink()
    assert of_run(made, distill)(33) is None


def test_unfinished_work_counts_from_where_it_is(plan: Callable[..., Plan], pace: float) -> None:
    made = plan()
    record(made)
    distill = made.run_dir / "distill"
    expected = pace * (390 + BESIDE + AFTER)
    assert time_left(made.run_dir, read_statuses(made.run_dir)) == pytest.approx(expected)
    write_steps(distill)  # of an earlier result
    assert time_left(made.run_dir, read_statuses(made.run_dir)) == pytest.approx(expected)
    begin_work(distill, begun(read_request(distill)))
    write_steps(distill)
    statuses = read_statuses(made.run_dir)
    assert time_left(made.run_dir, statuses) == pytest.approx(49 + pace * AFTER)
    complete = [stage for stage in statuses if stage.result]
    assert [stage.name for stage in complete] == list(BEFORE)
    assert time_left(made.run_dir, complete) is None


def write_steps(directory: Path) -> None:
    log = MetricsLog(directory / METRICS)
    for step in steps("distill", 2, 3):
        log.log(**step)
