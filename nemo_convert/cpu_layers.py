"""Layers for training without TransformerEngine, where Megatron's own are slow or refuse to split.

PyTorch composes RMSNorm and SwiGLU from many small operations on a CPU, each of which keeps a copy
of its input for the backward pass, and its fused attention is slow on its way back where windows
are short. The functions here keep the least, and multiply in the type of the activations. Values
and gradients are those of the layers they replace, to the rounding of that type. What lies between
products, but for attention, is ``fusable``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from nemo_convert.device import QUERIES_AT_ONCE
from recipes.core.one_pass import fusable
from recipes.core.precision import products_of

LONG = 1024
"""Tokens of a window above which a layer's scores, which grow with their square, are too many to
hold even once; PyTorch's attention never holds them."""


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) · weight in float32; keeps the input and one number per token."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        normed, inverse = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        return *_normalise_backward(x, weight, inverse, grads[0]), None


@fusable
def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse).mul_(weight).to(x.dtype), inverse


@fusable
def _normalise_backward(
    x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    normed = x * inverse
    weight_grad = (grad * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
    scaled = grad * weight.float()
    mean = (scaled * normed).mean(dim=-1, keepdim=True)
    return scaled.sub_(normed.mul_(mean)).mul_(inverse).to(x.dtype), weight_grad


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
        return _gate(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return _gate_backward(x, grads[0])


@fusable
def _gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate).mul_(up)


@fusable
def _gate_backward(x: Tensor, grad: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    gate_grad = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([gate_grad, nn.functional.silu(gate).mul_(grad)], dim=-1)


class SwiGLU(MegatronModule):  # type: ignore[misc]
    """The gated activation of Llama's feed-forward layer, as Megatron's layer specs build it."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., 2·ffn] to [..., ffn]."""
        gated: Tensor = _SwiGLU.apply(x)
        return gated


class _CausalAttention(torch.autograd.Function):
    """PyTorch's fused attention, with a backward pass that is faster where windows are short.

    Scores and softmax are in float32 and all other products in the input's type. The heads of a
    query group are rows of one matrix, so keys and values are never repeated. Of what comes after
    a token little is computed: a block of queries meets the keys up to its last.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:  # type: ignore[override]
        context = sdpa(query, key, value, scale)
        # A copy of the values, which else keep the queries and keys before their rotation, too.
        ctx.save_for_backward(query, key, value.contiguous(), context)
        ctx.scale = scale
        return context

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        query, key, value, context = ctx.saved_tensors
        with products_of(query.dtype):  # scores are the one product in float32
            return *_attention_backward(query, key, value, context, grads[0], ctx.scale), None


def _attention_backward(
    query: Tensor, key: Tensor, value: Tensor, context: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    length, batch, groups, size = key.shape
    k, v = (_groups_first(t) for t in (key, value))
    exact = k.float()
    key_grad, value_grad = torch.zeros_like(exact), torch.zeros_like(exact)
    query_grads = []
    grad_of = grad.view(query.shape)
    means = (grad_of.float() * context.view(query.shape)).sum(dim=-1, keepdim=True)
    for start, stop in _blocks(length):
        q, shape = _rows_of_groups(query[start:stop], groups)
        own_grad, _ = _rows_of_groups(grad_of[start:stop], groups)
        mean, _ = _rows_of_groups(means[start:stop], groups)
        # Made again: kept for every layer, they would be the largest of all activations.
        shares = _shares(q, exact[:, :stop], start, scale)
        value_grad[:, :stop] += torch.bmm(shares.transpose(1, 2), own_grad)
        mean = mean.to(grad.dtype).expand(-1, -1, stop)
        scores = torch.baddbmm(mean, own_grad, v[:, :stop].transpose(1, 2), beta=-1).mul_(shares)
        query_grads.append(_tokens_first(torch.bmm(scores, k[:, :stop]), shape))
        key_grad[:, :stop] += torch.bmm(scores.transpose(1, 2), q)
    key_grad, value_grad = (
        t.to(k.dtype).view(batch, groups, length, size).permute(2, 0, 1, 3)
        for t in (key_grad.mul_(scale), value_grad)
    )
    return torch.cat(query_grads).mul_(scale).view(query.shape), key_grad, value_grad


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Where blocks of queries begin and end."""
    size = QUERIES_AT_ONCE
    return ((start, min(start + size, length)) for start in range(0, length, size))


def _shares(q: Tensor, k: Tensor, start: int, scale: float) -> Tensor:
    """Attention of a block's rows to the keys in float32 up to its end, [b·groups, rows, keys].

    ``start`` is the first key that a row may have to leave out.
    """
    scores = torch.bmm(q.float() * scale, k.transpose(1, 2))
    own = k.shape[1] - start
    future = torch.full((own, own), float("-inf")).triu_(1)
    scores.unflatten(1, (-1, own))[..., start:].add_(future)
    return torch.softmax(scores, dim=-1).to(q.dtype)


def _groups_first(x: Tensor) -> Tensor:
    """[s, b, groups, d] as [b·groups, s, d]."""
    return x.permute(1, 2, 0, 3).flatten(0, 1).contiguous()


def _rows_of_groups(x: Tensor, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """[s, b, heads, d] as [b·groups, heads/groups·s, d]; and what ``_tokens_first`` needs."""
    split = x.unflatten(2, (groups, -1)).permute(1, 2, 3, 0, 4)
    return split.flatten(2, 3).flatten(0, 1), split.shape


def _tokens_first(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[b·groups, heads/groups·s, d] of such a shape as [s, b, heads·d]."""
    return x.view(shape).permute(3, 0, 1, 2, 4).flatten(2)


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
