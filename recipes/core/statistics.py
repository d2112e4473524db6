"""Means of samples and of paired differences, with their uncertainty. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

Z95 = NormalDist().inv_cdf(0.975)
"""Intervals are of the normal approximation: mean ± 1.96 standard errors."""
Z80 = NormalDist().inv_cdf(0.8)


@dataclass(frozen=True)
class Difference:
    """A mean of differences with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def detectable(self) -> float:
        """The smallest true difference whose interval would leave 0 out four times in five."""
        return (self.high - self.low) / 2 * (Z95 + Z80) / Z95


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean, from the sample's deviation; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    center = mean(values)
    variance = sum((value - center) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """How much better ``values`` are than ``reference``, item by item."""
    each = [value - other for value, other in zip(values, reference, strict=True)]
    value, margin = mean(each), Z95 * standard_error(each)
    return Difference(value, value - margin, value + margin)


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the points that no other beats; less is better on both axes.

    A point is beaten by one that is as good on both axes and better on one. Equal ones both stay.
    """
    return {
        i
        for i, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a < x or b < y) for a, b in points)
    }
