"""Layers that replace Megatron's slow local layers in models without TransformerEngine.

PyTorch composes RMSNorm and SwiGLU of many small operations. Each operation saves its input for the
backward pass. The functions of this module save as few tensors as possible. Outputs have the dtype
of the activations. Outputs and gradients equal those of the replaced layers up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from recipes.backend.device import QUERIES_AT_ONCE
from recipes.core.compiled import compilable
from recipes.core.precision import float32_matmul_of

LONGEST_BLOCKWISE = 1024
"""Longest sequence, in tokens, with the blockwise backward pass of ``attend_in_blocks``. This pass
stores a block's scores, whose size grows with the sequence. PyTorch's pass stores no scores."""
BLOCKWISE_BACKWARD = False
"""Whether attention uses ``attend_in_blocks``. A patch of ``cpu_speed`` sets this flag."""


class _RMSNorm(torch.autograd.Function):
    """Computes x / rms(x) * weight in float32. Saves x, the weight and one number per token."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        normed, inverse_rms = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return normed

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, inverse_rms = ctx.saved_tensors
        return *_normalize_backward(x, weight, inverse_rms, grads[0]), None


@compilable
def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x / rms(x) * weight, and 1 / rms(x)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse_rms).mul_(weight).to(x.dtype), inverse_rms


@compilable
def _normalize_backward(
    x: Tensor, weight: Tensor, inverse_rms: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and weight.

    With n = x / rms(x) and g = grad * weight, the gradient of x is (g - n * mean(g * n)) / rms(x),
    since rms depends on every channel. In-place operations change only new tensors.
    """
    normed = x * inverse_rms
    weight_grad = (grad * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
    scaled_grad = grad * weight.float()
    mean = (scaled_grad * normed).mean(dim=-1, keepdim=True)
    return scaled_grad.sub_(normed.mul_(mean)).mul_(inverse_rms).to(x.dtype), weight_grad


class RMSNorm(nn.Module):
    """RMSNorm with the constructor that Megatron's layer specs call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # With sequence parallelism, each rank has a shard of the sequence. Megatron sums the
        # gradients of a weight over these ranks if the weight has this attribute.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes the last dimension."""
        normed: Tensor = _RMSNorm.apply(x, self.weight, self._eps)
        return normed


class _SwiGLU(torch.autograd.Function):
    """Computes silu(gate) * up. x is the concatenation of gate and up. Saves only x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return _apply_gate(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return _apply_gate_backward(x, grads[0])


@compilable
def _apply_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate).mul_(up)


@compilable
def _apply_gate_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Returns the gradient of x: silu'(gate) * up * grad for gate, and silu(gate) * grad for up."""
    gate, up = x.chunk(2, dim=-1)
    gate_grad = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([gate_grad, nn.functional.silu(gate).mul_(grad)], dim=-1)


class SwiGLU(MegatronModule):  # type: ignore[misc]
    """The activation of Llama's feed-forward layer, as a module for Megatron's layer specs."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., 2·ffn] to [..., ffn]."""
        gated: Tensor = _SwiGLU.apply(x)
        return gated


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Computes causal attention with PyTorch's fused kernel.

    Args:
        query: [sequence, batch, heads, channels].
        key: [sequence, batch, query groups, channels].
        value: [sequence, batch, query groups, channels].
        scale: Factor of the scores before the softmax.

    Returns:
        [sequence, batch, heads * channels].
    """
    context = nn.functional.scaled_dot_product_attention(
        # PyTorch's layout is [batch, heads, sequence, channels].
        *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return context.permute(2, 0, 1, 3).flatten(2)


class _BlockwiseAttention(torch.autograd.Function):
    """PyTorch's fused attention, with a backward pass over blocks of queries.

    Scores and softmax are in float32, other matrix multiplications in the dtype of the inputs. The
    queries of all heads in a query group are rows of one matrix, so keys and values are never
    repeated. A block of queries is multiplied only with the keys up to the block's last position,
    because the causal mask discards later scores.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        context = attend(query, key, value, scale)
        # ``value`` is a view of the fused projection's output, which has query, key and value. A
        # saved view would keep the whole output in memory, so a copy is saved.
        ctx.save_for_backward(query, key, value.contiguous(), context)
        ctx.scale = scale
        return context

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, context = ctx.saved_tensors
        with float32_matmul_of(query.dtype):  # the scores are a float32 matrix multiplication
            gradients = _attention_backward(query, key, value, context, grads[0], ctx.scale)
        return *gradients, None


def _attention_backward(
    query: Tensor, key: Tensor, value: Tensor, context: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value.

    Let P = softmax(scale * Q K^T), O = P V (``context``), and dO the gradient of O (``grad``).
    Then dV = P^T dO, dP = dO V^T, and dS = P * (dP - rowsum(dO * O)), since rowsum(P * dP) =
    rowsum(dO * O). Finally dQ = scale * dS K and dK = scale * dS^T Q. In-place operations change
    only new tensors.
    """
    length, batch, groups, size = key.shape
    k, v = _groups_first(key), _groups_first(value)
    k_float32 = k.float()
    key_grad, value_grad = torch.zeros_like(k_float32), torch.zeros_like(k_float32)
    query_grads = []
    grad_heads = grad.view(query.shape)
    row_sums = (grad_heads.float() * context.view(query.shape)).sum(dim=-1, keepdim=True)
    for start in range(0, length, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, length)
        q, shape = _rows_of_groups(query[start:stop], groups)
        block_grad, _ = _rows_of_groups(grad_heads[start:stop], groups)
        row_sum, _ = _rows_of_groups(row_sums[start:stop], groups)
        # The block's rows of P. Saved probabilities of all layers would take most of the memory.
        probabilities = _probabilities(q, k_float32[:, :stop], start, scale)
        value_grad[:, :stop] += torch.bmm(probabilities.transpose(1, 2), block_grad)
        row_sum = row_sum.to(grad.dtype).expand(-1, -1, stop)
        # baddbmm returns dP - rowsum(dO * O). Multiplied by P, this is dS.
        score_grads = torch.baddbmm(row_sum, block_grad, v[:, :stop].transpose(1, 2), beta=-1)
        score_grads.mul_(probabilities)
        query_grads.append(_tokens_first(torch.bmm(score_grads, k[:, :stop]), shape))
        key_grad[:, :stop] += torch.bmm(score_grads.transpose(1, 2), q)
    # Reverses _groups_first: [b * groups, s, d] becomes [s, b, groups, d].
    key_grad, value_grad = (
        grad_sum.to(k.dtype).view(batch, groups, length, size).permute(2, 0, 1, 3)
        for grad_sum in (key_grad.mul_(scale), value_grad)
    )
    return torch.cat(query_grads).mul_(scale).view(query.shape), key_grad, value_grad


def _probabilities(q: Tensor, k: Tensor, start: int, scale: float) -> Tensor:
    """Returns the attention probabilities of a block of queries, in the dtype of ``q``.

    Args:
        q: The block's queries, [batch * groups, rows, channels]. A row is one query of one head.
        k: The keys up to the block's end, [batch * groups, keys, channels], in float32.
        start: Position of the block's first query. Keys from this position on need the causal mask.
        scale: Factor of the scores before the softmax.

    Returns:
        [batch * groups, rows, keys].
    """
    scores = torch.bmm(q.float() * scale, k.transpose(1, 2))
    block_size = k.shape[1] - start
    causal_mask = torch.full((block_size, block_size), float("-inf")).triu_(1)
    # Rows are ordered by head: ``block_size`` consecutive rows are one head's queries in order.
    scores_by_head = scores.unflatten(1, (-1, block_size))  # a view
    scores_by_head[..., start:].add_(causal_mask)
    return torch.softmax(scores, dim=-1).to(q.dtype)


def _groups_first(x: Tensor) -> Tensor:
    """Changes the shape [s, b, groups, d] to [b * groups, s, d]."""
    return x.permute(1, 2, 0, 3).flatten(0, 1).contiguous()


def _rows_of_groups(x: Tensor, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """Changes the shape [s, b, heads, d] to [b * groups, heads / groups * s, d].

    Also returns the shape [b, groups, heads / groups, s, d], which ``_tokens_first`` needs.
    """
    split = x.unflatten(2, (groups, -1)).permute(1, 2, 3, 0, 4)
    return split.flatten(2, 3).flatten(0, 1), split.shape


def _tokens_first(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reverses ``_rows_of_groups``, which returned ``shape``. The result is [s, b, heads * d]."""
    return x.view(shape).permute(3, 0, 1, 2, 4).flatten(2)


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Computes the same as ``attend``, with a blockwise backward pass for short sequences."""
    if len(query) > LONGEST_BLOCKWISE:
        return attend(query, key, value, scale)
    context: Tensor = _BlockwiseAttention.apply(query, key, value, scale)
    return context


class CausalAttention(DotProductAttention):  # type: ignore[misc]
    """Causal attention over whole, unpadded sequences.

    The base class is ``DotProductAttention`` only because ModelOpt recognizes its subclasses. The
    base class's ``forward``, which stores every score of every head, is not called.
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
        """Computes the same as ``attend``. Ignores ``attention_mask`` and further arguments."""
        attention = attend_in_blocks if BLOCKWISE_BACKWARD else attend
        return attention(query, key, value, self.softmax_scale)
