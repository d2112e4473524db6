"""What is replaced without CUDA or TransformerEngine does what its reason says."""

from __future__ import annotations

import threading

import pytest
import torch

from nemo_convert import nemo
from recipes.backend import without_cuda
from recipes.backend.local_layers import (
    WITHOUT_TRANSFORMER_ENGINE,
    adapt_config,
    register_rms_norm,
    training_block_spec,
)
from recipes.backend.patches import Patch
from recipes.backend.without_cuda import enable, limit_other_threads

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="active only without CUDA")


def test_no_effect_with_cuda_and_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.gpt import gpt_layer_specs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", True)
    monkeypatch.setattr(without_cuda, "_enabled", set())
    monkeypatch.setattr(without_cuda, "apply", pytest.fail)
    enable()
    config = object()
    assert adapt_config(config) is config


def test_cuda_without_transformer_engine_has_local_layers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA's names stay, and weights are created on the GPU."""
    enable()
    from nemo.collections.llm import LlamaConfig

    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8}
    config, applied = LlamaConfig(**shape), list[Patch]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(without_cuda, "_enabled", set())
    monkeypatch.setattr(without_cuda, "apply", applied.extend)
    enable()
    assert applied == list(WITHOUT_TRANSFORMER_ENGINE)
    adapted = adapt_config(config, training=True)
    assert adapted.transformer_layer_spec is training_block_spec
    assert adapted.apply_rope_fusion is False
    assert adapted.use_cpu_initialization is False


def test_only_this_thread_computes_on_all_cores() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    limit_other_threads()
    numbers = list[int]()
    other = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    other.start()
    other.join()
    here = torch.get_num_threads()
    torch.set_num_threads(before)
    assert (here, numbers) == (2, [1])


@needs_no_cuda
def test_tensors_meant_for_cuda_are_made_on_the_cpu() -> None:
    enable("torch")
    assert torch.tensor([1.0], device="cuda").device.type == "cpu"
    assert torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert torch.ones(2).to("cuda", non_blocking=True).device.type == "cpu"
    assert torch.ones(2).to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.ones(2).cuda().device.type == "cpu"
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.Event().record()
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == 0


@needs_no_cuda
def test_random_state_is_saved_and_restored() -> None:
    enable("torch", "megatron")
    from megatron.core.tensor_parallel import random as tracker

    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    tracker._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(tracker._get_cuda_rng_state(), torch.get_rng_state())
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))


@needs_no_cuda
def test_fused_attention_equals_megatrons() -> None:
    """Same output as the unfused attention that it replaces, with grouped queries."""
    enable("torch", "megatron")
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from recipes.backend.training_layers import CausalAttention

    nemo.initialize(nemo.Parallelism())
    config = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=4,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
    )
    settings = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    query = torch.randn(9, 2, 6, 4)
    key, value = torch.randn(2, 9, 2, 2, 4)
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None]
    expected = DotProductAttention(config, **settings)(query, key, value, mask)
    found = CausalAttention(config, **settings)(query, key, value, mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_no_cuda
def test_config_check_keeps_what_a_gpu_wants() -> None:
    enable()
    from nemo.collections.llm import LlamaConfig

    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8}
    config = LlamaConfig(**shape)
    assert config.apply_rope_fusion is True
    adapted = adapt_config(config)
    assert adapted.apply_rope_fusion is False
    assert adapted.use_cpu_initialization is True
    assert "use_cpu_initialization" not in repr(config.__io__)


@needs_no_cuda
def test_seed_reaches_megatrons_generators() -> None:
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


@needs_no_cuda
def test_modelopt_can_prune_a_norm() -> None:
    register_rms_norm()
    from modelopt.torch.nas.registry import DMRegistry

    assert torch.nn.RMSNorm in DMRegistry


@needs_no_cuda
def test_loading_needs_no_device() -> None:
    enable()
    from nemo.lightning.io import pl

    checkpoint = {"x": torch.ones(1)}
    assert pl._fix_tensors_device(checkpoint) is checkpoint
