"""What a training asks of its process, sets for it, and takes back."""

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


def test_garbage_is_collected_in_its_step() -> None:
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


def test_free_memory_is_given_back_before_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(callbacks, "return_free_memory", lambda: given.append(True))
    collect = CollectGarbage(DistillConfig(stage="distill", checkpoint_interval=2))
    for step in range(1, 5):
        collect.on_train_batch_end(SimpleNamespace(global_step=step), None)
        assert len(given) == step // 2
    collect.on_validation_start(None, None)
    collect.on_train_end(None, None)
    assert len(given) == 4


@pytest.mark.parametrize(("begun", "traces"), [(0, 1), (2, 1), (3, 0)])
def test_a_window_is_traced_from_where_a_run_is(tmp_path: Path, begun: int, traces: int) -> None:
    profile, trainer = Profile((2, 3), tmp_path), SimpleNamespace(global_step=begun)
    for _ in range(begun, 5):
        profile.on_train_batch_start(trainer)
        trainer.global_step += 1
        profile.on_train_batch_end(trainer)
    assert len(list(tmp_path.iterdir())) == traces


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_users_environment_stays(monkeypatch: pytest.MonkeyPatch, tensor: int) -> None:
    """And what depends on the GPU is left to the hardware profile."""
    environment = {"TORCH_NCCL_HIGH_PRIORITY": "0"}
    monkeypatch.setattr(os, "environ", environment)
    _set_environment(DistillConfig(stage="distill", tensor_model_parallel_size=tensor))
    assert environment["TORCH_NCCL_HIGH_PRIORITY"] == "0"
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment
