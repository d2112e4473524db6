"""Tests trainer callbacks: non-finite gradients, early stops, garbage collection and profiles."""

from __future__ import annotations

import gc
import math
import os
import re
import shutil
import socket
import weakref
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from nemo.lightning.megatron_parallel import MegatronParallel
from rich.console import Console

from launch.commands import status
from recipes.core.errors import RecipeError
from recipes.core.manifest import WORK
from recipes.core.metrics import METRICS, read_records, steps_of
from recipes.core.stage import DEADLINE
from recipes.distillation import callbacks, trainer
from recipes.distillation.callbacks import COLLECT_EVERY, CollectGarbage, Profile
from recipes.distillation.model import KDModel
from recipes.distillation.objective import LossReduction
from recipes.distillation.results import DistillationResult
from recipes.distillation.settings import DistillConfig
from recipes.distillation.trainer import _set_environment
from recipes.distillation.training import CHECKPOINTS
from recipes.evaluation.predictions import require_better_than_chance
from tests.support.in_process import run_in_process, run_successfully
from tests.support.launcher import run_recipe
from tests.support.runs import copy_without, manifest_of, settings


def test_a_teacher_of_chance_level_is_refused() -> None:
    # In a vocabulary of 300 tokens, a uniform guess has a loss of ln 300 = 5.704. The limit for a
    # teacher is 80% of it, 4.56.
    with pytest.raises(RecipeError, match=r"5\.70"):
        require_better_than_chance(5.70, 300)
    with pytest.raises(RecipeError):
        require_better_than_chance(float("nan"), 300)
    require_better_than_chance(4.0, 300)


@pytest.fixture
def distill_command(pruned_run: Path, short_recipe: list[str], tmp_path: Path) -> list[str]:
    """The command that distils in a copy of ``pruned_run``."""
    copy_without(pruned_run, tmp_path / "run")
    return [*short_recipe, "only=[distill]"]


def test_nonfinite_steps_are_skipped_up_to_a_limit_and_the_same_command_resumes(
    distill_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of skipped steps is saved in checkpoints, so it also counts after a restart.

    The first start skips step 4 and fails in step 5. The second start fails in step 5 again. The
    third start has finite losses.
    """
    forward, calls = LossReduction.forward, count(1)

    def forward_with_nan(*args: Any) -> tuple[Any, ...]:
        loss, *others = forward(*args)
        # Calls 4 and 5 are steps of the first start. Call 6 is step 5 of the second start.
        return (loss * math.nan if next(calls) in (4, 5, 6) else loss, *others)

    command = [*distill_command, *settings("distill", lr=1e-4, min_lr=1e-5)]
    with monkeypatch.context() as patch:
        patch.setattr(LossReduction, "forward", forward_with_nan)
        for limit in (1, 0):  # the second limit is lower than the number of steps already skipped
            limit_setting = settings("distill", max_nonfinite_steps=limit)
            stopped = run_in_process(*command, *limit_setting, cwd=tmp_path)
            assert stopped.code == 1
            assert re.search(r"step 5: .* not finite .* 1 such step", stopped.output)
            assert "the last checkpoint is usable" in stopped.output
    advice = re.search(r"stages\.distill\.max_nonfinite_steps=\d", stopped.output)
    assert advice is not None
    assert advice.group().endswith("=2")
    fewer_checkpoints = settings("distill", keep_checkpoints=1, checkpoint_interval=2)
    resumed = run_successfully(*command, advice.group(), *fewer_checkpoints, cwd=tmp_path)
    assert re.search(r"distill +resume", resumed.output)
    steps = steps_of(tmp_path / "run" / "distill" / METRICS, "distill")
    assert [step["done"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [bool(step.get("skipped")) for step in steps] == [False] * 3 + [True] + [False] * 2
    assert steps[-1]["lr"] > 1.5e-5, "the logged lr must be that of the step, not of the next one"


def test_validation_losses_are_means_over_tokens(
    distill_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the second of two batches is over one token per sequence, 1 of 64.

    So the mean over tokens is close to the first batch's loss. A mean over batches would not be.
    """
    forward_step, validation_step = KDModel.forward_step, MegatronParallel.validation_step
    losses: list[float] = []

    def mask_second_batch(self: KDModel, batch: dict[str, Any]) -> torch.Tensor:
        if not self.training and len(losses) % 2:
            batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
            batch["loss_mask"][:, 0] = 1
        return forward_step(self, batch)

    def record_loss(self: MegatronParallel, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = validation_step(self, *args, **kwargs)
        losses.append(float(loss))
        return loss

    monkeypatch.setattr(KDModel, "forward_step", mask_second_batch)
    monkeypatch.setattr(MegatronParallel, "validation_step", record_loss)
    shorter = settings("distill", max_steps=1, warmup_steps=0, limit_val_batches=2)
    run_successfully(*distill_command, *shorter, cwd=tmp_path)
    [validation] = steps_of(tmp_path / "run" / "distill" / METRICS, "validate")
    first, second = losses
    assert abs(second - first) > 0.01
    assert validation["val_loss"] == pytest.approx(first, abs=0.05 * abs(second - first))


def test_a_validation_precedes_a_stop_at_the_deadline(
    distill_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two starts stop after one step each; a validation is due after the second step."""
    command = [*distill_command, *settings("distill", val_check_interval=2)]
    with monkeypatch.context() as patch:
        patch.setenv(DEADLINE, "1")  # seconds since 1970, so the deadline has passed
        for step in (1, 2):
            stopped = run_in_process(*command, cwd=tmp_path)
            assert f"stopped at the deadline; step {step} of 6 is saved" in stopped.output
    run_successfully(*command, cwd=tmp_path)
    metrics = tmp_path / "run" / "distill" / METRICS
    assert [step["done"] for step in steps_of(metrics, "distill")] == [1, 2, 3, 4, 5, 6]
    assert [validation["done"] for validation in steps_of(metrics, "validate")] == [2, 4, 6]


def test_a_run_that_recovered_enough_stops_and_is_complete(
    distill_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is interrupted before it saves its result. A restart stops at the same step again.

    Recovery is measured by the KL of validation text, for any training loss.
    """
    run_dir = tmp_path / "run"
    learning = settings("distill", lr=1e-3, lm_weight=0, val_check_interval=1)
    command = [*distill_command, *learning, "stages.distill.stop_at_recovered=0.7"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_save_trained", Mock(side_effect=KeyboardInterrupt))
        assert run_in_process(*command, cwd=tmp_path).code == 130
    for action in ("resume", "skip"):  # the last command finds a complete stage
        again = run_successfully(*command, cwd=tmp_path)
        assert re.search(rf"distill +{action}", again.output)
    records = list(read_records(run_dir / "distill" / METRICS))
    done = [record["done"] for record in records if record["task"] == "distill"]
    kds = [record["val_kd"] for record in records if record["task"] == "validate"]
    # One validation before the first step, and one after each step.
    assert done == [*range(1, len(kds))]
    assert len(done) < 6
    recovered = [1 - kd / kds[0] for kd in kds]
    assert [fraction >= 0.7 for fraction in recovered] == [False] * len(done) + [True]
    # The KL of validation text before the first step, and the KL of the first step, are both
    # measured before any update. The texts are of one source, so the KL differs only by noise.
    first_step_kd = steps_of(run_dir / "distill" / METRICS, "distill")[0]["kd"]
    assert kds[0] == pytest.approx(first_step_kd, rel=0.3)
    result = manifest_of(run_dir, "distill").result(DistillationResult)
    batch_tokens = 4 * 64  # 4 sequences of 64 tokens
    assert (result.steps, result.tokens) == (len(done), len(done) * batch_tokens)
    reason = f"stopped at step {len(done)} of 6: recovered {recovered[-1]:.0%}"
    assert result.stopped.startswith(reason)
    console = Console(record=True, width=200)
    status({"run_dir": str(run_dir)}, console)
    assert result.stopped in console.export_text()
    # Before the first step, students that are trained with different losses have the same weights.
    shutil.rmtree(run_dir / "distill")
    other_loss = settings("distill", logits_loss="reverse_kl", temperature=2, top_k=8, max_steps=2)
    run_successfully(*command, *other_loss, cwd=tmp_path)
    assert steps_of(run_dir / "distill" / METRICS, "validate")[0]["val_kd"] == pytest.approx(kds[0])


def test_a_diverging_run_stops_before_its_weights_are_lost(
    distill_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate of 1e38 overflows float32. The checkpoint before the overflow remains.

    ``MASTER_PORT`` is in use during the run, to test that a single rank needs no port.
    """
    with socket.create_server(("localhost", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        result = run_recipe(*distill_command, "stages.distill.lr=1e38", cwd=tmp_path)
    assert result.code == 1
    assert "the gradient is not finite" in result.output
    stage = tmp_path / "run" / "distill"
    done = [step["done"] for step in steps_of(stage / METRICS, "distill")]
    assert f"step {done[-1] + 1}: the gradient is not finite" in result.output
    assert "lower stages.distill.lr" in result.output
    assert "Traceback" not in result.output
    # Names of checkpoints count steps from 0.
    assert (stage / WORK / CHECKPOINTS / f"step={done[-1] - 1}").is_dir()


class Cycle:
    """An object that refers to itself, so only the garbage collector frees it."""

    def __init__(self) -> None:
        self.cycle = self


def test_garbage_is_collected_at_its_interval() -> None:
    cfg = DistillConfig(stage="distill", checkpoint_interval=COLLECT_EVERY)
    callback, trainer = CollectGarbage(cfg), SimpleNamespace(global_step=COLLECT_EVERY - 1)
    try:
        callback.on_train_start(trainer, None)
        assert not gc.isenabled()
        garbage = weakref.ref(Cycle())
        callback.on_train_batch_end(trainer, None)
        assert garbage() is not None
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, None)
        assert garbage() is None
    finally:
        callback.teardown(trainer, None, "fit")
    assert gc.isenabled()


def test_free_memory_is_returned_before_checkpoints_and_validations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(callbacks, "return_free_memory", lambda: calls.append(True))
    callback = CollectGarbage(DistillConfig(stage="distill", checkpoint_interval=2))
    for step in range(1, 5):
        callback.on_train_batch_end(SimpleNamespace(global_step=step), None)
        assert len(calls) == step // 2  # one call per checkpoint
    callback.on_validation_start(None, None)
    callback.on_train_end(None, None)
    assert len(calls) == 4


@pytest.mark.parametrize(("start", "stop", "traces"), [(0, 5, 1), (2, 5, 1), (3, 5, 0), (1, 2, 1)])
def test_configured_steps_are_traced(tmp_path: Path, start: int, stop: int, traces: int) -> None:
    """Training resumes after ``start`` steps and ends after ``stop``; steps 2 and 3 are configured.

    After a restart or before an early end, the trace has only the steps that ran.
    """
    profile, trainer = Profile((2, 3), tmp_path), SimpleNamespace(global_step=start)
    for _ in range(start, stop):
        profile.on_train_batch_start(trainer)
        trainer.global_step += 1
        profile.on_train_batch_end(trainer)
    profile.on_train_end()
    assert len(list(tmp_path.iterdir())) == traces


def test_existing_environment_variables_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"TORCH_NCCL_HIGH_PRIORITY": "0"}
    monkeypatch.setattr(os, "environ", environment)
    _set_environment(DistillConfig(stage="distill", tensor_model_parallel_size=2))
    assert environment["TORCH_NCCL_HIGH_PRIORITY"] == "0"
    assert environment["NVTE_FWD_LAYERNORM_SM_MARGIN"] == "16"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment, "only hardware profiles set it"
