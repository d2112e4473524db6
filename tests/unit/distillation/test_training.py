"""Checks before training, progress of a killed run, and early stops. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.core.metrics import METRICS, MetricsLog
from recipes.distillation.settings import CorrectTeacherConfig, DistillConfig
from recipes.distillation.training import (
    CHECKPOINTS,
    INITIAL_KL,
    complete_checkpoints,
    steps_of_checkpoint,
    stop_reason,
    training_progress,
    training_result,
)
from recipes.planning.chain import Chain
from recipes.planning.hardware import Hardware
from recipes.stages.correct_teacher import STAGE


def test_progress_is_the_last_complete_checkpoint(tmp_path: Path) -> None:
    assert training_progress(tmp_path) is None
    for name in ("step=9", "step=19-last", "step=29"):
        (tmp_path / CHECKPOINTS / name).mkdir(parents=True)
    (tmp_path / CHECKPOINTS / "step=29-unfinished").touch()  # NeMo's marker while it writes
    assert training_progress(tmp_path) == "step 20"
    assert {steps_of_checkpoint(path) for path in complete_checkpoints(tmp_path / CHECKPOINTS)} == {
        10,
        20,
    }


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, None),
        ({"max_steps": 5}, "schedule"),  # fewer than ``warmup_steps``
        ({"seq_length": 4096}, "seq-length"),  # more than ``max_position_embeddings``
        # there is only one rank
        ({"sequence_parallel": True, "tensor_model_parallel_size": 2}, "ranks"),
    ],
)
def test_problems_of_any_training(chain: Chain, fields: dict[str, Any], rule: str | None) -> None:
    problems = STAGE.problems(CorrectTeacherConfig(**fields), chain)
    assert [problem.rule.name for problem in problems] == ([rule] if rule else [])


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({}, []),
        ({"fp8_recipe": "delayed"}, []),
        ({"precision": "32"}, ["precision=32"]),
        ({"micro_batch_size": 1, "seq_length": 40}, ["a micro batch is 40"]),
    ],
)
def test_problems_of_fp8(chain: Chain, fields: dict[str, Any], messages: list[str]) -> None:
    gpu_chain = replace(chain, hardware=Hardware("h100", "gpu", memory_bytes=80e9))
    problems = list(STAGE.problems(CorrectTeacherConfig(fp8="hybrid", **fields), gpu_chain))
    assert {problem.rule.name for problem in problems} == ({"fp8"} if messages else set())
    assert all(message in p.what for message, p in zip(messages, problems, strict=True))


def test_a_loss_that_is_not_a_number_is_no_result(tmp_path: Path) -> None:
    """The last step was skipped, and the last validation was not finite."""
    log, file = MetricsLog(tmp_path / METRICS), tmp_path / METRICS
    for done, value in ((1, 0.5), (2, math.nan)):
        log.progress("distill", done, 9, loss=value, tokens_per_second=1.0)
        log.progress("validate", done, 9, val_loss=value, val_kd=value)
    cfg = DistillConfig(stage="distill", max_steps=9, stop_at_recovered=0.5)
    result = training_result(cfg, file)
    assert (result.final_loss, result.steps, result.val_loss) == (0.5, 2, None)
    assert stop_reason(cfg, file, 2) == ""


STEPS = 300
REMAINING = 0.5
"""Fraction of the KL added by pruning that healing left."""


@pytest.mark.parametrize(
    ("fields", "remaining", "step", "reason"),
    [
        ({}, None, 200, ""),
        ({"stop_at_recovered": 0.8}, None, 0, ""),
        ({"stop_at_recovered": 0.8}, None, 100, ""),
        ({"stop_at_recovered": 0.7}, None, 199, "step 100 of 300: recovered 75%"),
        ({"stop_at_recovered": 0.8}, None, 200, "step 200 of 300: recovered 85%"),
        ({"stop_at_recovered": 0.8, "max_steps": 200}, None, 200, ""),  # this was the last step
        ({"stop_at_recovered": 0.8}, REMAINING, 100, "step 100 of 300: recovered 88%"),
        ({"stop_at_recovered": 0.9}, REMAINING, 100, ""),
        ({"stop_at_recovered": 0.4}, REMAINING, 0, ""),  # a training run has at least one step
    ],
)
def test_training_stops_at_the_recovered_fraction(
    tmp_path: Path, fields: dict[str, Any], remaining: float | None, step: int, reason: str
) -> None:
    log = MetricsLog(tmp_path / METRICS)
    if remaining:
        log.progress("student", 1, 1, **{INITIAL_KL: remaining})
    for done, kd in {0: 0.8, 100: 0.2, 200: 0.12}.items():
        log.progress("validate", done, STEPS, val_kd=kd)
    cfg = DistillConfig(stage="distill", **{"max_steps": STEPS, **fields})
    stopped = stop_reason(cfg, tmp_path / METRICS, step)
    assert reason in stopped
    assert bool(reason) == bool(stopped)
