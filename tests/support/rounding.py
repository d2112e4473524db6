"""Tolerances that follow from the arithmetic of the machine that a test runs on.

The same sum in another order differs by rounding, and how much rounding grows over a computation
depends on the processor's kernels. So a test measures it: it runs the computation once more with
its input changed by one unit in the last place, and allows a multiple of what that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ULP = torch.finfo(torch.float32).eps


def by_one_ulp(tensor: Tensor, seed: int = 0) -> Tensor:
    """Returns a tensor whose elements are each one unit in the last place larger or smaller."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randint(2, tensor.shape, generator=generator, dtype=torch.bool)
    towards = torch.where(up, torch.inf, -torch.inf).to(tensor)
    return tensor + (torch.nextafter(tensor.detach(), towards) - tensor.detach())


def growth(expected: Sequence[float], perturbed: Sequence[float]) -> list[float]:
    """Returns, for each value of a sequence, the largest difference so far.

    No difference counts as less than one unit in the last place.
    """
    pairs = zip(expected, perturbed, strict=True)
    return list(accumulate((max(abs(a - b), ULP * abs(a)) for a, b in pairs), max))
