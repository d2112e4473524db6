"""Computes standard errors, paired differences and Pareto fronts without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

Z95 = NormalDist().inv_cdf(0.975)
"""Half the width of a 95% interval, in standard errors, of many values."""
Z80 = NormalDist().inv_cdf(0.8)


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95% interval.

    The interval assumes independent values. Adjacent sequences of a text may come from the same
    document, so the true interval can then be wider.
    """

    value: float
    low: float
    high: float

    @property
    def detectable(self) -> float:
        """The smallest true difference whose interval excludes 0 with a probability of 80%.

        Computed for many values; somewhat too large for a few.
        """
        # A power of 80% needs Z95 + Z80 standard errors; half of the interval is Z95 of them.
        return (self.high - self.low) / 2 * (Z95 + Z80) / Z95


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean, from the standard deviation; infinite for one value.

    Values are assumed to be independent, see ``Difference``.
    """
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Returns the mean of the paired differences ``values[i] - reference[i]``."""
    from scipy.special import stdtrit  # only stages need it, and a login node does not have it

    differences = [x - y for x, y in zip(values, reference, strict=True)]
    # Student's t has wider intervals than ``Z95`` for few values. For one value, the error is
    # infinite, so any quantile will do.
    quantile = float(stdtrit(max(1, len(differences) - 1), 0.975))
    mean, margin = fmean(differences), quantile * standard_error(differences)
    return Difference(mean, mean - margin, mean + margin)


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Returns the indices of points that no other point dominates; lower is better on both axes.

    A point dominates another if it is at least as good on both axes and better on at least one.
    """
    return {
        i
        for i, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a < x or b < y) for a, b in points)
    }
