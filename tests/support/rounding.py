"""Measures the effect of rounding on this machine, for tolerances of tests.

A sum in another order differs by rounding. How much such differences grow in a computation depends
on the processor's kernels. A test therefore repeats the computation with its input changed
by one unit in the last place (ulp), and allows a multiple of the resulting difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

ULP = torch.finfo(torch.float32).eps
ROUNDINGS = 10
"""Two computations of a model may differ by this multiple of ``measure_ulp_noise``."""


def perturb_by_one_ulp(tensor: Tensor, seed: int = 0) -> Tensor:
    """Returns the tensor with each element one ulp larger or smaller. Gradients pass unchanged."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randint(2, tensor.shape, generator=generator, dtype=torch.bool)
    towards = torch.where(up, torch.inf, -torch.inf).to(tensor)
    return tensor + (torch.nextafter(tensor.detach(), towards) - tensor.detach())


@torch.no_grad()
def measure_ulp_noise(model: nn.Module, output: Callable[[], Tensor]) -> float:
    """Changes each weight of a model by one ulp, and returns the largest change of the output.

    The result is at least one ulp of the largest output. The weights stay changed.
    """
    before = output()
    for seed, weight in enumerate(model.parameters()):
        weight.copy_(perturb_by_one_ulp(weight, seed))
    return max((output() - before).abs().max().item(), ULP * before.abs().max().item())


def running_max_difference(expected: Sequence[float], perturbed: Sequence[float]) -> list[float]:
    """Returns, for each position of two sequences, the largest difference up to this position.

    A difference of less than one ulp counts as one ulp.
    """
    pairs = zip(expected, perturbed, strict=True)
    return list(accumulate((max(abs(a - b), ULP * abs(a)) for a, b in pairs), max))
