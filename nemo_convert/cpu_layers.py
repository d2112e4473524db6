"""Layers for training without TransformerEngine, where Megatron's own are slow or refuse to split.

PyTorch composes RMSNorm and SwiGLU from many small operations on a CPU, each of which keeps a copy
of its input for the backward pass, and its fused attention multiplies in float32. The functions
here keep the least, and multiply in the type of the activations. Values and gradients are those of
the layers they replace, to the rounding of that type.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from recipes.core.precision import products_of

LONG = 1024
"""Tokens of a window above which a layer's scores, which grow with their square, are too many to
hold even once; PyTorch's attention never holds them."""


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) · weight in float32; keeps the input and one number per token."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        weight_grad = (grads[0] * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        scaled = grads[0] * weight.float()
        mean = (scaled * normed).mean(dim=-1, keepdim=True)
        return scaled.sub_(normed.mul_(mean)).mul_(inverse).to(x.dtype), weight_grad, None


class RMSNorm(nn.Module):
    """RMSNorm as Megatron's layer specs build it; Megatron's own refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron then adds up the gradients of the ranks' parts of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        normed: Tensor = _RMSNorm.apply(x, self.weight, self._eps)
        return normed


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up of [..., gate and up]; keeps only its input."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        gate_grad, up_grad = out.chunk(2, dim=-1)
        torch.mul(grads[0], nn.functional.silu(gate), out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=gate_grad)
        return out


class SwiGLU(MegatronModule):  # type: ignore[misc]
    """The gated activation of Llama's feed-forward layer, as Megatron's layer specs build it."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., 2·ffn] to [..., ffn]."""
        gated: Tensor = _SwiGLU.apply(x)
        return gated


class _CausalAttention(torch.autograd.Function):
    """Attention with scores and softmax in float32 and all other products in the input's type.

    The heads of a query group are rows of one matrix, so keys and values are never repeated.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:  # type: ignore[override]
        length, batch, heads, size = query.shape
        groups = key.shape[2]
        ctx.shape = length, batch, groups, heads // groups, size
        ctx.scale = scale
        q = _rows_of_groups(query, ctx.shape)
        k, v = (t.permute(1, 2, 0, 3).reshape(batch * groups, length, size) for t in (key, value))
        context = torch.bmm(_shares(q, k, ctx.shape, scale), v)
        ctx.save_for_backward(q, k, v, context)
        return _tokens_first(context, ctx.shape)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, context = ctx.saved_tensors
        length, batch, groups, _, size = ctx.shape
        # Made again: kept for every layer, they would be the largest of all activations.
        shares = _shares(q, k, ctx.shape, ctx.scale)
        grad = _rows_of_groups(grads[0].view(length, batch, -1, size), ctx.shape)
        value_grad = torch.bmm(shares.transpose(1, 2), grad)
        mean = (grad.float() * context).sum(dim=-1, keepdim=True).to(grad.dtype)
        means = mean.expand(-1, -1, length)
        scores = torch.baddbmm(means, grad, v.transpose(1, 2), beta=-1).mul_(shares)
        query_grad = _tokens_first(torch.bmm(scores, k).mul_(ctx.scale), ctx.shape)
        key_grad = torch.bmm(scores.transpose(1, 2), q).mul_(ctx.scale)
        key_grad, value_grad = (
            t.view(batch, groups, length, size).permute(2, 0, 1, 3) for t in (key_grad, value_grad)
        )
        return query_grad.view(length, batch, -1, size), key_grad, value_grad, None


def _shares(q: Tensor, k: Tensor, shape: tuple[int, ...], scale: float) -> Tensor:
    """Attention of every query row to every key, [b·groups, heads/groups·s, s]."""
    length, _, _, repeat, _ = shape
    future = torch.full((length, length), float("-inf")).triu_(1).repeat(repeat, 1)
    with products_of(q.dtype):
        scores = torch.baddbmm(future, q.float(), k.float().transpose(1, 2), alpha=scale)
    return torch.softmax(scores, dim=-1).to(q.dtype)


def _rows_of_groups(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[s, b, heads, d] as [b·groups, heads/groups·s, d]."""
    length, batch, groups, repeat, size = shape
    split = x.reshape(length, batch, groups, repeat, size).permute(1, 2, 3, 0, 4)
    return split.reshape(batch * groups, repeat * length, size)


def _tokens_first(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[b·groups, heads/groups·s, d] as [s, b, heads·d]."""
    length, batch, groups, repeat, size = shape
    split = x.view(batch, groups, repeat, length, size).permute(3, 0, 1, 2, 4)
    return split.reshape(length, batch, groups * repeat * size)


class CausalAttention(DotProductAttention):  # type: ignore[misc]
    """Causal attention over whole, unpadded sequences; ``attention_mask`` is not read."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Returns [s, b, heads·d] for query [s, b, heads, d], key and value [s, b, groups, d]."""
        if len(query) > LONG or query.device.type != "cpu":
            return sdpa(query, key, value, self.softmax_scale)
        context: Tensor = _CausalAttention.apply(query, key, value, self.softmax_scale)
        return context


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """PyTorch's fused causal attention, in Megatron's order of dimensions."""
    context = nn.functional.scaled_dot_product_attention(
        *(t.permute(1, 2, 0, 3) for t in (query, key, value)),
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return context.permute(2, 0, 1, 3).flatten(2)
