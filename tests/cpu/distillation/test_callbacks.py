"""Garbage collection, profiles and environment variables of a training."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes.distillation import callbacks
from recipes.distillation.callbacks import COLLECT_EVERY, CollectGarbage, Profile
from recipes.distillation.settings import DistillConfig
from recipes.distillation.trainer import _set_environment


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_collected_at_its_interval() -> None:
    cfg = DistillConfig(stage="distill", checkpoint_interval=COLLECT_EVERY)
    collect, trainer = CollectGarbage(cfg), SimpleNamespace(global_step=COLLECT_EVERY - 1)
    try:
        collect.on_train_start(trainer, None)
        assert not gc.isenabled()
        garbage = weakref.ref(Cycle())
        collect.on_train_batch_end(trainer, None)
        assert garbage() is not None
        trainer.global_step += 1
        collect.on_train_batch_end(trainer, None)
        assert garbage() is None
    finally:
        collect.teardown(trainer, None, "fit")
    assert gc.isenabled()


def test_free_memory_is_returned_before_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = []
    monkeypatch.setattr(callbacks, "return_free_memory", lambda: returned.append(True))
    collect = CollectGarbage(DistillConfig(stage="distill", checkpoint_interval=2))
    for step in range(1, 5):
        collect.on_train_batch_end(SimpleNamespace(global_step=step), None)
        assert len(returned) == step // 2
    collect.on_validation_start(None, None)
    collect.on_train_end(None, None)
    assert len(returned) == 4


@pytest.mark.parametrize(("start", "traces"), [(0, 1), (2, 1), (3, 0)])
def test_steps_are_traced_after_a_restart_too(tmp_path: Path, start: int, traces: int) -> None:
    profile, trainer = Profile((2, 3), tmp_path), SimpleNamespace(global_step=start)
    for _ in range(start, 5):
        profile.on_train_batch_start(trainer)
        trainer.global_step += 1
        profile.on_train_batch_end(trainer)
    assert len(list(tmp_path.iterdir())) == traces


def test_existing_environment_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"TORCH_NCCL_HIGH_PRIORITY": "0"}
    monkeypatch.setattr(os, "environ", environment)
    _set_environment(DistillConfig(stage="distill", tensor_model_parallel_size=2))
    assert environment["TORCH_NCCL_HIGH_PRIORITY"] == "0"
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment, "the hardware profile sets it"
