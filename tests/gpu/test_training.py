"""Distillation beside a live teacher: the CPU's losses; killed, stopped by the clock, taken up."""

from __future__ import annotations

import os
import time
from pathlib import Path
from unittest import mock

import pytest

from recipes.core.manifest import WORK
from recipes.core.metrics import METRICS
from recipes.core.stage import DEADLINE
from recipes.distillation.training import CHECKPOINTS, whole_checkpoints
from tests.gpu.small import PRECISIONS, Small, farthest, record, steps
from tests.support.launcher import run_and_kill, run_recipe

CLOSE = {"32": 1e-3, "bf16-mixed": 2e-2}
ONLY = "only=[distill]"
PRECISION = "stages.distill.precision="
AGAIN = 1e-3
"""Of sums whose order a GPU does not keep."""


def whole(small: Small, precision: str) -> Path:
    """The undisturbed run on the GPU."""
    return small.folder / f"gpu-{precision}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_are_the_cpus(precision: str, small: Small, results: Path) -> None:
    """From a float32 checkpoint, with main weights that are not rounded, and a trace."""
    run_dir = small.again(whole(small, precision).name, precision, "distill")
    small.start(run_dir, ONLY, PRECISION + precision, "stages.distill.profile_steps=[10,12]")
    expected = small.reference(precision)
    terms = ("loss", "kd", "lm", "grad_norm")
    found = {term: farthest(expected, run_dir, term) for term in terms}
    [trace] = (run_dir / "distill" / "profile").iterdir()
    trace.replace(results / f"training-{precision}-{trace.name}")
    speed = [step["tokens_per_second"] for step in steps(run_dir)]
    record(results, f"training-{precision}", differences=found, tokens_per_second=speed)
    assert found["loss"] < CLOSE[precision]
    assert found["kd"] < 2 * CLOSE[precision]


def test_killed_it_goes_on(small: Small) -> None:
    """It saves after every other step, and waits for that: else a GPU is done before the kill."""
    run_dir, often = small.again("killed", "32", "distill"), "stages.distill.checkpoint_interval=2"
    command = small.command(run_dir, ONLY, PRECISION + "32", often)
    stage = run_dir / "distill"
    run_and_kill(
        *command,
        cwd=small.folder,
        metrics=stage / METRICS,
        records=3,
        ready=lambda: whole_checkpoints(stage / WORK / CHECKPOINTS),
    )
    assert "resume" in small.start(run_dir, ONLY, PRECISION + "32", often)
    assert farthest(whole(small, "32"), run_dir) < AGAIN


def test_clock_stops_it(small: Small) -> None:
    """After the first step, its time being up."""
    run_dir = small.again("stopped", "32", "distill")
    command = small.command(run_dir, ONLY, PRECISION + "32")
    with mock.patch.dict(os.environ, {DEADLINE: str(time.time())}):
        stopped = run_recipe(*command, cwd=small.folder)
    assert stopped.code != 0
    assert "stopped by the clock at step 1 of" in stopped.output
    assert "resume" in small.start(run_dir, ONLY, PRECISION + "32")
    assert farthest(whole(small, "32"), run_dir) < AGAIN
