"""The CPU's own layers against those that they replace, values and gradients, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nemo_convert import nemo
from nemo_convert.cpu_layers import SwiGLU, _CausalAttention, _RMSNorm
from nemo_convert.cpu_products import _Linear
from nemo_convert.device import QUERIES_AT_ONCE
from tests.support.conversion import assert_trains_alike, convert_by_command, core_of
from tests.support.gradients import inputs, with_gradients

LENGTH, BATCH, HEADS, GROUPS, SIZE = QUERIES_AT_ONCE + 9, 3, 6, 2, 10


def gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    context = nn.functional.scaled_dot_product_attention(
        *(t.permute(1, 2, 0, 3) for t in (query, key, value)),
        is_causal=True,
        scale=0.3,
        enable_gqa=True,
    )
    return context.permute(2, 0, 1, 3).flatten(2)


CASES = {
    "linear": (
        lambda x, w: _Linear.apply(x, w),
        nn.functional.linear,
        [(LENGTH, BATCH, 24), (10, 24)],
    ),
    "norm": (
        lambda x, w: _RMSNorm.apply(x, w, 1e-5),
        lambda x, w: nn.functional.rms_norm(x, (24,), w, 1e-5),
        [(LENGTH, BATCH, 24), (24,)],
    ),
    "swiglu": (lambda x: SwiGLU(None)(x), gated, [(LENGTH, BATCH, 24)]),
    "attention": (
        lambda q, k, v: _CausalAttention.apply(q, k, v, 0.3),
        attention,
        [(LENGTH, BATCH, HEADS, SIZE), *[(LENGTH, BATCH, GROUPS, SIZE)] * 2],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs, shapes = CASES[name]
    tensors = [t.to(dtype) for t in inputs(*shapes)]
    found = with_gradients(ours, tensors)
    expected = with_gradients(theirs, [t.double() for t in tensors])
    assert len(found) == len(expected) == len(shapes) + 1
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < tolerance * other.norm()


def test_a_model_of_these_layers_is_the_same_model(odd_llama: Path, tmp_path: Path) -> None:
    """Logits and every weight's gradient, with an odd number of everything."""
    checkpoint = tmp_path / "odd.nemo"
    assert convert_by_command("to-nemo", odd_llama, checkpoint) == 0
    nemo.initialize(nemo.Parallelism())
    tokens = torch.randint(0, 280, (2, 31), generator=torch.Generator().manual_seed(1))
    assert_trains_alike(checkpoint, tokens)


def test_megatron_takes_the_fused_adam(odd_llama: Path, tmp_path: Path) -> None:
    """Its own fallback asks PyTorch for the unfused one, which takes five times as long."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    checkpoint = tmp_path / "odd.nemo"
    assert convert_by_command("to-nemo", odd_llama, checkpoint) == 0
    nemo.initialize(nemo.Parallelism())
    core = core_of(checkpoint, training=True)
    wrapped = DistributedDataParallel(core.config, DistributedDataParallelConfig(), core)
    chained = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), [wrapped])
    assert type(chained.chained_optimizers[0].optimizer).__name__ == "FusedAdamW"
