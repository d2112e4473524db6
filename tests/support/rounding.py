"""Measures the effect of rounding on this machine, from which tests compute their tolerances.

A sum changes by rounding errors if its terms are added in another order. How much these errors grow
in a computation depends on the processor's kernels. A test therefore repeats the computation with
weights or inputs that are changed by one unit in the last place (ulp). The test allows a multiple
of the resulting difference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ULP = torch.finfo(torch.float32).eps  # one ulp of a value is at most this times the value's size
NOISE_FACTOR = 10
"""Outputs of a model that are computed in two ways may differ by this multiple of
``measure_ulp_noise``."""


def perturb_by_one_ulp(tensor: Tensor, seed: int = 0) -> Tensor:
    """Returns the tensor with each element, at random, one ulp larger or smaller.

    The gradient of the result with respect to ``tensor`` is 1.
    """
    generator = torch.Generator().manual_seed(seed)
    up = torch.randint(2, tensor.shape, generator=generator, dtype=torch.bool)
    towards = torch.where(up, torch.inf, -torch.inf).to(tensor)
    # The added change is detached, because torch.nextafter has no gradient.
    return tensor + (torch.nextafter(tensor.detach(), towards) - tensor.detach())


@torch.no_grad()
def measure_ulp_noise(model: nn.Module, output: Callable[[], Tensor]) -> float:
    """Changes each weight of a model by one ulp, and returns the largest change of the output.

    The result is at least one ulp of the largest output. The weights stay changed. ``output``
    computes the output with the current weights.
    """
    before = output()
    for seed, weight in enumerate(model.parameters()):
        weight.copy_(perturb_by_one_ulp(weight, seed))
    change = (output() - before).abs().max().item()
    return max(change, ULP * before.abs().max().item())
