"""An operation's value and its gradients, of numbers that are the same every time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The function's value, and its gradients under a fixed upstream gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    [upstream] = inputs(tuple(value.shape))
    value.backward(upstream.to(value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
