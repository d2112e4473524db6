"""Causal attention with a backward pass that is faster on a CPU for short sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from recipes.backend.device import QUERIES_AT_ONCE
from recipes.core.precision import products_of

LONG = 1024
"""Sequence length above which one layer's scores, which grow with its square, are too large to hold
even once; PyTorch's kernel never holds them."""


class _CausalAttention(torch.autograd.Function):
    """PyTorch's fused attention, with a backward pass over blocks of queries.

    Scores and softmax are in float32, all other matrix multiplications in the input's type. The
    heads of a query group are rows of one matrix, so keys and values are never repeated. A block of
    queries is multiplied with the keys up to its last position, so little of the causal mask's
    upper half is computed.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, scale: float, attend: Any
    ) -> Tensor:
        context: Tensor = attend(query, key, value, scale)
        # ``value`` is a view of the projection's output. A copy lets the rest of that be freed.
        ctx.save_for_backward(query, key, value.contiguous(), context)
        ctx.scale = scale
        return context

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, context = ctx.saved_tensors
        with products_of(query.dtype):  # for the scores, which are multiplied in float32
            gradients = _attention_backward(query, key, value, context, grads[0], ctx.scale)
        return *gradients, None, None


def _attention_backward(
    query: Tensor, key: Tensor, value: Tensor, context: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value.

    With P = softmax(scale * Q K^T) and O = P V: dV = P^T dO, dP = dO V^T, and
    dS = P * (dP - rowsum(dO * O)), since rowsum(P * dP) = rowsum(dO * O). Then dQ = scale * dS K
    and dK = scale * dS^T Q. All in-place writes are into tensors made here.
    """
    length, batch, groups, size = key.shape
    k, v = (_groups_first(t) for t in (key, value))
    k_float32 = k.float()
    key_grad, value_grad = torch.zeros_like(k_float32), torch.zeros_like(k_float32)
    query_grads = []
    grad_of = grad.view(query.shape)
    means = (grad_of.float() * context.view(query.shape)).sum(dim=-1, keepdim=True)
    for start, stop in _blocks(length):
        q, shape = _rows_of_groups(query[start:stop], groups)
        own_grad, _ = _rows_of_groups(grad_of[start:stop], groups)
        mean, _ = _rows_of_groups(means[start:stop], groups)
        # Recomputed: saved for every layer, they would be the largest of all activations.
        probabilities = _probabilities(q, k_float32[:, :stop], start, scale)
        value_grad[:, :stop] += torch.bmm(probabilities.transpose(1, 2), own_grad)
        mean = mean.to(grad.dtype).expand(-1, -1, stop)
        scores = torch.baddbmm(mean, own_grad, v[:, :stop].transpose(1, 2), beta=-1)
        scores.mul_(probabilities)
        query_grads.append(_tokens_first(torch.bmm(scores, k[:, :stop]), shape))
        key_grad[:, :stop] += torch.bmm(scores.transpose(1, 2), q)
    key_grad, value_grad = (
        t.to(k.dtype).view(batch, groups, length, size).permute(2, 0, 1, 3)
        for t in (key_grad.mul_(scale), value_grad)
    )
    return torch.cat(query_grads).mul_(scale).view(query.shape), key_grad, value_grad


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Returns the start and end of each block of queries."""
    size = QUERIES_AT_ONCE
    return ((start, min(start + size, length)) for start in range(0, length, size))


def _probabilities(q: Tensor, k: Tensor, start: int, scale: float) -> Tensor:
    """Returns the attention of a block's rows to all keys up to its end.

    Args:
        q: [batch * groups, rows, channels].
        k: [batch * groups, keys, channels], in float32.
        start: Position of the block's first query; keys from there on are partly in its future.
        scale: Factor of the scores.

    Returns:
        [batch * groups, rows, keys], in the type of ``q``.
    """
    scores = torch.bmm(q.float() * scale, k.transpose(1, 2))
    own = k.shape[1] - start
    future = torch.full((own, own), float("-inf")).triu_(1)
    scores.unflatten(1, (-1, own))[..., start:].add_(future)
    return torch.softmax(scores, dim=-1).to(q.dtype)


def _groups_first(x: Tensor) -> Tensor:
    """Returns [s, b, groups, d] as [b * groups, s, d]."""
    return x.permute(1, 2, 0, 3).flatten(0, 1).contiguous()


def _rows_of_groups(x: Tensor, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """Returns [s, b, heads, d] as [b * groups, heads / groups * s, d], and its split shape."""
    split = x.unflatten(2, (groups, -1)).permute(1, 2, 3, 0, 4)
    return split.flatten(2, 3).flatten(0, 1), split.shape


def _tokens_first(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns [b * groups, heads / groups * s, d] as [s, b, heads * d]."""
    return x.view(shape).permute(3, 0, 1, 2, 4).flatten(2)


def attend_in_blocks(original: Any) -> Any:
    """Replaces ``training_layers.attend`` for sequences up to ``LONG``."""

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if len(query) > LONG:
            context: Tensor = original(query, key, value, scale)
        else:
            context = _CausalAttention.apply(query, key, value, scale, original)
        return context

    return attend
