"""Computes standard errors, paired differences and Pareto fronts without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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
    low: float | None
    high: float | None
    """Ends of the interval; ``None`` for a single value, which has none."""

    @property
    def is_negative(self) -> bool:
        """Whether the interval is below 0."""
        return self.high is not None and self.high < 0

    @property
    def is_positive(self) -> bool:
        """Whether the interval is above 0."""
        return self.low is not None and self.low > 0

    @property
    def detectable(self) -> float | None:
        """The smallest true difference whose interval excludes 0 with a probability of 80%.

        Computed for many values; somewhat too large for a few.
        """
        if self.low is None or self.high is None:
            return None
        # A power of 80% needs Z95 + Z80 standard errors; half of the interval is Z95 of them.
        return (self.high - self.low) / 2 * (Z95 + Z80) / Z95


def standard_error(values: Sequence[float]) -> float | None:
    """Returns the standard error of the mean, from the standard deviation; ``None`` for one value.

    Values are assumed to be independent, see ``Difference``.
    """
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def margin95(error: float | None, values: int) -> float | None:
    """Returns half the width of the 95% interval of a mean.

    Args:
        error: Standard error of the mean.
        values: Number of values; few values have wide intervals, by Student's t.
    """
    return None if error is None or values < 2 else _t95(values - 1) * error


@cache
def _t95(freedom: int) -> float:
    """Returns the 97.5% quantile of Student's t, by bisection; a login node does not have scipy."""
    low, high = Z95, 12.8  # the quantiles of infinitely many degrees of freedom, and of one
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, freedom) < 0.95 else (low, middle)
    return high


def _t_probability(t: float, freedom: int) -> float:
    """Returns the probability that Student's t is between -t and t.

    From Abramowitz and Stegun, formulas 26.7.3 and 26.7.4: a sum of powers of a cosine, with odd
    exponents for odd degrees of freedom.
    """
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    term, total = math.cos(angle) ** odd, 0.0
    for exponent in range(odd, freedom - 1, 2):
        total += term
        term *= (exponent + 1) / (exponent + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


def difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Returns the mean of the paired differences ``values[i] - reference[i]``.

    The interval is Student's t, also of losses. If all of n scores in [0, 1] differ equally, that
    interval has no width, so it is the mean ± 3/n.
    """
    differences = [x - y for x, y in zip(values, reference, strict=True)]
    mean, margin = fmean(differences), margin95(standard_error(differences), len(differences))
    if margin is None:
        return Difference(mean, None, None)
    if margin == 0 and all(0 <= value <= 1 for value in (*values, *reference)):
        # The rule of three (Hanley and Lippman-Hand 1983): with 95% confidence, an event that did
        # not occur in n items has a probability below 3/n.
        margin = 3 / len(differences)
        return Difference(mean, max(-1.0, mean - margin), min(1.0, mean + margin))
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
