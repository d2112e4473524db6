"""Products of linear layers on a CPU, where PyTorch's library leaves threads idle.

oneDNN, which multiplies bfloat16, splits a product among threads by rules of its own, and gives
some to one thread alone: with AMX and 1,024 rows those with 576 columns, the hidden size of
SmolLM2-135M. Halves of them are split. Which products that is true of depends on processor, threads
and version, so each shape is timed when it is first needed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

LEAST = 1e8
"""FLOPs below which a product is not worth two."""
CLEARLY = 0.85
"""Share of a whole product's time that its halves must take less than."""
REPEATS = 3
_halved: dict[tuple[object, ...], bool] = {}


def product(x: Tensor, weight: Tensor) -> Tensor:
    """[..., inputs] times [inputs, outputs], in two halves of the outputs where that is faster."""
    flops = 2 * x.numel() * weight.shape[1]
    threads = torch.get_num_threads()
    if threads == 1 or x.dtype != torch.bfloat16 or flops < LEAST:
        return x @ weight
    shape = (x.numel() // x.shape[-1], *weight.shape, *weight.stride(), threads)
    if shape not in _halved:
        _halved[shape] = _seconds(_in_halves, x, weight) < CLEARLY * _seconds(
            torch.matmul, x, weight
        )
    return _in_halves(x, weight) if _halved[shape] else x @ weight


def _in_halves(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    whole = rows.new_empty(len(rows), weight.shape[1])
    for part, half in zip(whole.chunk(2, dim=1), weight.chunk(2, dim=1), strict=True):
        torch.mm(rows, half, out=part)
    return whole.view(*x.shape[:-1], -1)


def _seconds(work: Callable[[Tensor, Tensor], Tensor], *args: Tensor) -> float:
    """Of the fastest of some runs, after one in which the library makes its kernel."""
    found = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        work(*args)
        found.append(time.perf_counter() - began)
    return min(found[1:])


class _Linear(torch.autograd.Function):
    """x · weightᵀ with weight [outputs, inputs]; no gradient is made that nobody asks for."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return product(x, weight.t())

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        [grad] = grads
        of_x, of_weight = ctx.needs_input_grad
        return (
            product(grad, weight) if of_x else None,
            grad.flatten(0, -2).t() @ x.flatten(0, -2) if of_weight else None,
        )


def alone(original: Any) -> Any:
    """Megatron's linear layer, where no rank has but a part of its input's gradient or sequence."""

    @functools.wraps(original)  # with what it notes in itself
    def linear(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs["allreduce_dgrad"] or kwargs["sequence_parallel"]:
            split: Tensor = original(input, weight, *args, **kwargs)
            return split
        linear_of: Tensor = _Linear.apply(input, weight)
        return linear_of if kwargs["bias"] is None else linear_of + kwargs["bias"]

    return linear
