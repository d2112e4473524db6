"""Computes the value and the gradients of a function for fixed random tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Returns normally distributed tensors in float64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def value_and_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Returns a function's value and its gradients for a fixed upstream gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    [upstream] = random_tensors(tuple(value.shape))
    value.backward(upstream.to(value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
