"""Patches for machines without CUDA or TransformerEngine have the effects that they state."""

from __future__ import annotations

import threading

import pytest
import torch

from nemo_convert import nemo
from recipes.backend import without_cuda
from recipes.backend.local_layers import (
    WITHOUT_TRANSFORMER_ENGINE,
    adapt_config,
    needs_local_layers,
    training_block_spec,
)
from recipes.backend.patches import Patch
from recipes.backend.without_cuda import enable, limit_other_threads
from recipes.core.errors import RecipeError

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="active only without CUDA")
SHAPE = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8}


def test_no_effect_with_cuda_and_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.gpt import gpt_layer_specs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", True)
    monkeypatch.setattr(without_cuda, "_enabled", set())  # as in a new process
    monkeypatch.setattr(without_cuda, "apply", pytest.fail)
    enable()
    config = object()
    assert adapt_config(config) is config


def test_cuda_without_transformer_engine_only_needs_local_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enable()  # this machine may have no CUDA
    from nemo.collections.llm import LlamaConfig

    config, applied = LlamaConfig(**SHAPE), list[Patch]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(without_cuda, "_enabled", set())  # as in a new process
    monkeypatch.setattr(without_cuda, "apply", applied.extend)
    enable()
    assert applied == list(WITHOUT_TRANSFORMER_ENGINE)
    adapted = adapt_config(config, training=True)
    assert adapted.transformer_layer_spec is training_block_spec
    assert adapted.apply_rope_fusion is False
    assert adapted.use_cpu_initialization is False


def test_transformer_engine_that_cannot_be_imported_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # Tests run without TransformerEngine. First it is not installed, then it seems to be.
    assert needs_local_layers()
    monkeypatch.setattr("recipes.backend.local_layers.installed_version", lambda _: "2.9.0")
    with pytest.raises(RecipeError, match=r"TransformerEngine 2\.9\.0 is installed but cannot"):
        needs_local_layers()


def test_only_the_calling_thread_computes_on_all_cores() -> None:
    """Two OpenMP threads stand in for all cores."""
    previous_count = torch.get_num_threads()
    torch.set_num_threads(2)
    limit_other_threads()
    counts_in_later_thread = list[int]()
    later = threading.Thread(target=lambda: counts_in_later_thread.append(torch.get_num_threads()))
    later.start()
    later.join()
    count_in_this_thread = torch.get_num_threads()
    torch.set_num_threads(previous_count)
    assert (count_in_this_thread, counts_in_later_thread) == (2, [1])


@needs_no_cuda
def test_cuda_tensors_are_created_on_the_cpu() -> None:
    enable("torch")
    assert torch.tensor([1.0], device="cuda").device.type == "cpu"
    assert torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert torch.ones(2).to("cuda", non_blocking=True).device.type == "cpu"
    assert torch.ones(2).to(torch.bfloat16).dtype == torch.bfloat16  # as without the patch
    assert torch.ones(2).cuda().device.type == "cpu"
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.Event().record()
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == 0


@needs_no_cuda
def test_random_state_is_saved_and_restored() -> None:
    enable("torch", "megatron")
    from megatron.core.tensor_parallel import random as megatron_random

    # The CPU's generator replaces the GPU's.
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    megatron_random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(megatron_random._get_cuda_rng_state(), torch.get_rng_state())
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))


@needs_no_cuda
def test_fusions_are_disabled_only_in_the_adapted_config() -> None:
    enable()
    from nemo.collections.llm import LlamaConfig

    config = LlamaConfig(**SHAPE)
    assert config.apply_rope_fusion is True
    adapted = adapt_config(config)
    assert adapted.apply_rope_fusion is False
    assert adapted.use_cpu_initialization is True
    # NeMo saves ``__io__`` in checkpoints.
    assert "use_cpu_initialization" not in repr(config.__io__)


@needs_no_cuda
def test_seed_reaches_megatrons_generators() -> None:
    """The same seed gives the same random numbers twice."""
    enable()
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from nemo.lightning import megatron_init

    nemo.initialize(nemo.Parallelism())
    draws = []
    for _ in range(2):
        megatron_init._set_random_seed(77)
        with get_cuda_rng_tracker().fork():
            draws.append(torch.rand(3))
    assert torch.equal(*draws)
