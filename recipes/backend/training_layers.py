"""Layers for models without TransformerEngine, where Megatron's own are slow or refuse to be split.

PyTorch composes RMSNorm and SwiGLU of many small operations, each of which saves its input for the
backward pass, and Megatron's local norm refuses sequence parallelism. The functions here save the
minimum and compute in the type of the activations. Values and gradients are those of the layers
that they replace, to the rounding of that type.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from recipes.core.compiled import compilable


class _RMSNorm(torch.autograd.Function):
    """Computes x / rms(x) * weight in float32; saves the input and one number per token."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        normed, inverse = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        return *_normalise_backward(x, weight, inverse, grads[0]), None


@compilable
def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the normalised input and 1 / rms(x); in-place writes are into new tensors."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse).mul_(weight).to(x.dtype), inverse


@compilable
def _normalise_backward(
    x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and weight.

    With n = x / rms(x) and g = grad * weight, the gradient of x is (g - n * mean(g * n)) / rms(x),
    since rms depends on every channel. Each in-place operation writes into a tensor made here.
    """
    normed = x * inverse
    weight_grad = (grad * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
    scaled = grad * weight.float()
    mean = (scaled * normed).mean(dim=-1, keepdim=True)
    return scaled.sub_(normed.mul_(mean)).mul_(inverse).to(x.dtype), weight_grad


class RMSNorm(nn.Module):
    """RMSNorm with the constructor that Megatron's layer specs call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradients of all ranks' sections of the sequence where this is set.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        normed: Tensor = _RMSNorm.apply(x, self.weight, self._eps)
        return normed


class _SwiGLU(torch.autograd.Function):
    """Computes silu(gate) * up of [..., gate and up]; saves only its input."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return _gate(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return _gate_backward(x, grads[0])


@compilable
def _gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate).mul_(up)


@compilable
def _gate_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Returns the gradient of x: silu'(gate) * up * grad for the gate, silu(gate) * grad for up."""
    gate, up = x.chunk(2, dim=-1)
    gate_grad = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([gate_grad, nn.functional.silu(gate).mul_(grad)], dim=-1)


class SwiGLU(MegatronModule):  # type: ignore[misc]
    """The gated activation of Llama's feed-forward layer, as Megatron's layer specs build it."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., 2·ffn] to [..., ffn]."""
        gated: Tensor = _SwiGLU.apply(x)
        return gated


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Computes causal attention with PyTorch's fused kernel.

    Args:
        query: [sequence, batch, heads, channels].
        key: [sequence, batch, query groups, channels].
        value: As ``key``.
        scale: Factor of the scores before the softmax.

    Returns:
        [sequence, batch, heads * channels].
    """
    context = nn.functional.scaled_dot_product_attention(
        *(t.permute(1, 2, 0, 3) for t in (query, key, value)),
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return context.permute(2, 0, 1, 3).flatten(2)


class CausalAttention(DotProductAttention):  # type: ignore[misc]
    """Causal attention over whole, unpadded sequences.

    Megatron's own class holds every score of every head. ModelOpt knows its subclasses.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Returns what ``attend`` returns; ``attention_mask`` is not read."""
        return attend(query, key, value, self.softmax_scale)
