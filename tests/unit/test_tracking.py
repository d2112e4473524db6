"""Trackers get what a stage records, from a file that any run has."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.console import Follower
from launch.plan import Plan
from launch.tracking import TRACKERS, require_known
from recipes.errors import RecipeError
from recipes.metrics import METRICS, MetricsLog


def follow(plan: Plan, tracker: str, records: Callable[[MetricsLog], None]) -> None:
    stage = next(stage for stage in plan.stages if stage.name == "distill")
    stage.directory.mkdir(parents=True, exist_ok=True)
    with (
        TRACKERS[tracker](plan.run_dir, stage.name) as track,
        Follower(stage, Console(quiet=True), track) as follower,
    ):
        records(MetricsLog(stage.directory / METRICS))
        follower.update()


def test_tensorboard_has_every_term_of_every_step(plan: Callable[..., Plan]) -> None:
    def records(log: MetricsLog) -> None:
        log.progress("distill", 1, 2, loss=2.0, kd=1.5, lm=0.5)
        log.progress("distill", 2, 2, loss=None, kd=0.5, skipped=True, note="x")
        log.progress("validate", 2, 2, val_loss=1.25)
        log.log(message="not progress")

    planned = plan()
    follow(planned, "tensorboard", records)
    board = EventAccumulator(str(planned.run_dir / "tensorboard" / "distill")).Reload()
    found = {
        tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]
    }
    assert found == {
        "distill/loss": [(1, 2.0)],
        "distill/kd": [(1, 1.5), (2, 0.5)],
        "distill/lm": [(1, 0.5)],
        "distill/skipped": [(2, 1.0)],
        "validate/val_loss": [(2, 1.25)],
    }
    assert not math.isnan(board.Scalars("distill/loss")[0].wall_time)


def test_no_tracker_leaves_nothing(plan: Callable[..., Plan]) -> None:
    planned = plan()
    follow(planned, "none", lambda log: log.progress("distill", 1, 2, loss=2.0))
    assert not (planned.run_dir / "tensorboard").exists()


def test_an_unknown_tracker_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'tensorboard'"):
        require_known("tensorbord")


def test_tensorboard_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from launch.tracking import TRACKERS\n"
        "with TRACKERS['tensorboard'](pathlib.Path(sys.argv[1]), 's') as track:\n"
        "    track({'task': 't', 'done': 1, 'total': 1, 'time': 0.0, 'x': 1.0})\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tensorboard" / "s").iterdir())
