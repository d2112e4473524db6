"""Computes the value and the gradients of a function, with reproducible random tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Returns normally distributed float64 tensors, which are the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def value_and_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Computes a function's value, and its gradients for a fixed random upstream gradient.

    Returns the value, then the gradient of each tensor on which the value depends.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    [upstream] = random_tensors(tuple(value.shape))
    value.backward(upstream.to(value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
