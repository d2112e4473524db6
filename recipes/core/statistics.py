"""Computes standard errors, paired differences and Pareto fronts without torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean, stdev

Z95 = NormalDist().inv_cdf(0.975)
"""Half the width of a 95% interval of a normal distribution, in standard deviations."""
Z80 = NormalDist().inv_cdf(0.8)
"""80% of a normal distribution are below this number of standard deviations above the mean."""
MAX_EXPONENT = math.log(sys.float_info.max)
"""``math.exp`` raises OverflowError for larger numbers."""


@dataclass(frozen=True)
class Difference:
    """A mean difference ``value`` with its 95% interval from ``low`` to ``high``.

    The ends are ``None`` for a single pair of values. The interval assumes independent pairs. It
    is too narrow for adjacent sequences of a text, which may come from the same document.
    """

    value: float
    low: float | None
    high: float | None

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
        """The smallest true difference for which 80% of repetitions give an interval without 0.

        For few values, the returned difference is somewhat too large.
        """
        if self.low is None or self.high is None:
            return None
        # A power of 80% needs a difference of Z95 + Z80 standard errors. Half of the interval is
        # Z95 standard errors.
        return (self.high - self.low) / 2 * (Z95 + Z80) / Z95


def standard_error(values: Sequence[float]) -> float | None:
    """Returns the standard error of the mean; ``None`` for fewer than two values.

    Assumes independent values. The result is NaN if a value is NaN or infinite.
    """
    if len(values) < 2:
        return None
    if not all(map(math.isfinite, values)):
        return math.nan  # ``stdev`` raises AttributeError in Python 3.11
    return stdev(values) / math.sqrt(len(values))


def perplexity(loss: float) -> float:
    """Returns exp(loss); infinity if that is too large for a float."""
    return math.inf if loss > MAX_EXPONENT else math.exp(loss)


def margin95(error: float | None, values: int) -> float | None:
    """Returns half the width of the 95% interval of a mean, by Student's t-distribution.

    ``error`` is the mean's standard error, and ``values`` is the number of values. Returns ``None``
    without an error or for fewer than two values.
    """
    return None if error is None or values < 2 else _t95(values - 1) * error


@cache
def _t95(degrees: int) -> float:
    """Returns t for which 95% of Student's t-distribution are between -t and t.

    ``degrees`` are the degrees of freedom. Uses bisection, because a login node has no scipy.
    """
    low, high = Z95, 12.8  # t is Z95 for infinitely many degrees of freedom, and 12.71 for one
    for _ in range(40):  # halves the error 40 times, to about 1e-11
        middle = (low + high) / 2
        if _t_probability(middle, degrees) < 0.95:
            low = middle
        else:
            high = middle
    return high


def _t_probability(t: float, degrees: int) -> float:
    """Returns the probability that a value of Student's t-distribution is between -t and t.

    Abramowitz and Stegun, formulas 26.7.3 (odd degrees of freedom n) and 26.7.4 (even n), where
    c and s are the cosine and sine of a = atan(t / sqrt(n))::

        odd:   2/pi * (a + s * (c + 2/3 c^3 + 2*4/(3*5) c^5 + ... up to c^(n-2)))
        even:  s * (1 + 1/2 c^2 + 1*3/(2*4) c^4 + ... up to c^(n-2))
    """
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2  # also the exponent of c in the first term of the inner sum
    term, total = math.cos(angle) ** odd, 0.0
    for exponent in range(odd, degrees - 1, 2):
        total += term
        term *= (exponent + 1) / (exponent + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


def difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Returns the mean of the paired differences ``values[i] - reference[i]``.

    The interval is from Student's t-distribution. It has no width if all n differences are equal.
    For scores in [0, 1], such an interval is replaced by the mean ± 3/n.
    """
    differences = [x - y for x, y in zip(values, reference, strict=True)]
    mean, margin = fmean(differences), margin95(standard_error(differences), len(differences))
    if margin is None:
        return Difference(mean, None, None)
    if margin == 0 and all(0 <= value <= 1 for value in (*values, *reference)):
        # The rule of three (Hanley and Lippman-Hand 1983): with 95% confidence, an event that did
        # not occur in n items has a probability below 3/n. The event here: a different difference.
        margin = 3 / len(differences)
        return Difference(mean, max(-1.0, mean - margin), min(1.0, mean + margin))
    return Difference(mean, mean - margin, mean + margin)


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Returns the indices of points that no other point dominates; lower is better on both axes.

    A point dominates another if it is at least as good on both axes and better on at least one.
    """

    def is_dominated(x: float, y: float) -> bool:
        return any(a <= x and b <= y and (a < x or b < y) for a, b in points)

    return {index for index, (x, y) in enumerate(points) if not is_dominated(x, y)}
