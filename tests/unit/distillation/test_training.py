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
    checkpoints = complete_checkpoints(tmp_path / CHECKPOINTS)
    # NeMo counts steps from 0, so ``step=9`` is written after 10 steps.
    assert {steps_of_checkpoint(path) for path in checkpoints} == {10, 20}


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, None),
        ({"max_steps": 5}, "schedule"),  # fewer than ``warmup_steps``
        ({"seq_length": 4096}, "seq-length"),  # more than ``max_position_embeddings``
        # more than the default of one rank
        ({"sequence_parallel": True, "tensor_model_parallel_size": 2}, "ranks"),
    ],
)
def test_a_training_stage_checks_its_settings(
    chain: Chain, fields: dict[str, Any], rule: str | None
) -> None:
    problems = STAGE.problems(CorrectTeacherConfig(**fields), chain)
    assert [problem.rule.name for problem in problems] == ([rule] if rule else [])


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({}, []),
        ({"fp8_recipe": "delayed"}, []),
        ({"precision": "32"}, ["precision=32"]),
        # 40 tokens are not a multiple of 16, which FP8 needs
        ({"micro_batch_size": 1, "seq_length": 40}, ["a micro batch is 40"]),
    ],
)
def test_fp8_needs_bf16_mixed_and_multiples_of_16(
    chain: Chain, fields: dict[str, Any], messages: list[str]
) -> None:
    gpu_chain = replace(chain, hardware=Hardware("h100", "gpu", memory_bytes=80e9))
    problems = list(STAGE.problems(CorrectTeacherConfig(fp8="hybrid", **fields), gpu_chain))
    assert {problem.rule.name for problem in problems} == ({"fp8"} if messages else set())
    assert all(message in p.what for message, p in zip(messages, problems, strict=True))


def test_nan_losses_are_not_in_the_result(tmp_path: Path) -> None:
    """The losses of step 2 are NaN, in training and in validation."""
    file = tmp_path / METRICS
    log = MetricsLog(file)
    for step, loss in ((1, 0.5), (2, math.nan)):
        log.progress("distill", step, 9, loss=loss, tokens_per_second=1.0)
        log.progress("validate", step, 9, val_loss=loss, val_kd=loss)
    cfg = DistillConfig(stage="distill", max_steps=9, stop_at_recovered=0.5)
    result = training_result(cfg, file)
    assert (result.final_loss, result.steps, result.val_loss) == (0.5, 2, None)
    assert stop_reason(cfg, file, 2) == ""  # needs two validations with a finite loss


STEPS = 300
"""Number of training steps."""
REMAINING = 0.5
"""Fraction of the KL added by pruning that remains after healing."""
VALIDATIONS = {0: 0.8, 100: 0.2, 200: 0.12}
"""KL at each validation, by step. 1 - 0.2/0.8 = 75% and 1 - 0.12/0.8 = 85% are recovered. After
healing, 1 - 0.5 · 0.2/0.8 = 88% are recovered at step 100."""


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
        # healing has recovered 50%, but a training run has at least one step
        ({"stop_at_recovered": 0.4}, REMAINING, 0, ""),
    ],
)
def test_training_stops_at_the_recovered_fraction(
    tmp_path: Path, fields: dict[str, Any], remaining: float | None, step: int, reason: str
) -> None:
    log = MetricsLog(tmp_path / METRICS)
    if remaining:
        log.progress("student", 1, 1, **{INITIAL_KL: remaining})
    for validated_step, kd in VALIDATIONS.items():
        log.progress("validate", validated_step, STEPS, val_kd=kd)
    cfg = DistillConfig(stage="distill", **{"max_steps": STEPS, **fields})
    full_reason = stop_reason(cfg, tmp_path / METRICS, step)
    assert reason in full_reason if reason else full_reason == ""
