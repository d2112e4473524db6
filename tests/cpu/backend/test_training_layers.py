"""Training layers have the values and gradients of plain PyTorch in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.backend.cpu_speed import speed_patches
from recipes.backend.device import QUERIES_AT_ONCE
from recipes.backend.training_layers import (
    LONGEST_BLOCKWISE,
    CausalAttention,
    SwiGLU,
    _RMSNorm,
    attend,
    attend_in_blocks,
)
from tests.support.gradients import random_tensors, value_and_gradients

LENGTH = QUERIES_AT_ONCE + 9  # tokens: a block of queries and an incomplete second block
BATCH, HEADS, GROUPS, HEAD_SIZE = 3, 6, 2, 10
SCALE = 0.3  # of attention scores
QUERY_KEY_VALUE = [(LENGTH, BATCH, HEADS, HEAD_SIZE), *[(LENGTH, BATCH, GROUPS, HEAD_SIZE)] * 2]
"""Shapes of queries, keys and values, as in Megatron. Keys and values have ``GROUPS`` heads."""


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Computes scores, causal mask and softmax, with keys and values repeated for each head.

    Returns:
        The attention output, of shape [tokens, sequences, heads * head size].
    """
    length = len(query)
    q, k, v = (
        t.repeat_interleave(HEADS // t.shape[2], dim=2).permute(1, 2, 0, 3)
        for t in (query, key, value)
    )
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(2, 3) * SCALE).masked_fill(future, float("-inf"))
    return (scores.softmax(dim=-1) @ v).permute(2, 0, 1, 3).flatten(2)


CASES = {
    "norm": (
        lambda x, w: _RMSNorm.apply(x, w, 1e-5),
        lambda x, w: nn.functional.rms_norm(x, (24,), w, 1e-5),
        [(LENGTH, BATCH, 24), (24,)],
    ),
    "swiglu": (lambda x: SwiGLU(None)(x), plain_swiglu, [(LENGTH, BATCH, 24)]),
    "attention": (lambda q, k, v: attend(q, k, v, SCALE), plain_attention, QUERY_KEY_VALUE),
    "attention in blocks": (
        lambda q, k, v: attend_in_blocks(q, k, v, SCALE),
        plain_attention,
        QUERY_KEY_VALUE,
    ),
}
"""By name: a training layer, its reference in plain PyTorch, and the shapes of their inputs."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_equal_plain_pytorch(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    """``tolerance`` is relative to the norm, and allows for the rounding of ``dtype``."""
    layer, reference, shapes = CASES[name]
    tensors = [t.to(dtype) for t in random_tensors(*shapes)]
    actual = value_and_gradients(layer, tensors)
    expected = value_and_gradients(reference, [t.double() for t in tensors])
    # The value, and a gradient of each input.
    assert len(actual) == len(expected) == len(shapes) + 1
    for tensor, exact in zip(actual, expected, strict=True):
        assert tensor.dtype == dtype
        assert (tensor.double() - exact).norm() < tolerance * exact.norm()


def test_long_sequences_keep_pytorchs_backward_pass() -> None:
    """The blockwise backward pass would need too much memory, in proportion to the length."""
    query, key, value = random_tensors(*[(LONGEST_BLOCKWISE + 1, 1, 2, 4)] * 3)
    context = attend_in_blocks(query.requires_grad_(), key, value, SCALE)
    assert "BlockwiseAttention" not in type(context.grad_fn).__name__


@pytest.mark.skipif(torch.cuda.is_available(), reason="speed patches are active only without CUDA")
@pytest.mark.parametrize("names", [[], ["attention_backward"]])
def test_the_speed_patch_selects_the_blockwise_backward_pass(names: list[str]) -> None:
    query, key, value = random_tensors(*QUERY_KEY_VALUE)
    attention: Any = SimpleNamespace(softmax_scale=SCALE)  # all that ``forward`` reads of ``self``
    with speed_patches(names):
        context = CausalAttention.forward(attention, query.requires_grad_(), key, value, None)
    assert ("BlockwiseAttention" in type(context.grad_fn).__name__) == bool(names)
