"""Statistics of figures that were measured on the same items: means, and paired differences.

Two models that answer the same questions mostly fail on the same ones. Differences item by item
leave that shared part out, so their interval is narrower than two bare means would allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

ROLES = ("teacher", "pruned", "distilled")
Z95 = NormalDist().inv_cdf(0.975)
"""Intervals are of the normal approximation: mean ± 1.96 standard errors."""


@dataclass(frozen=True)
class Difference:
    """A mean of differences with its 95% interval."""

    value: float
    low: float
    high: float


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


def recovered(
    teacher: Sequence[float], pruned: Sequence[float], distilled: Sequence[float]
) -> float | None:
    """Share of what pruning cost that distillation won back: 1 is the teacher, 0 the pruned model.

    ``None`` where pruning cost less than noise, that is, where the 95% interval of its paired
    difference to the teacher reaches 0: a share of nothing says nothing.
    """
    cost = difference(pruned, teacher)
    if cost.high >= 0:
        return None
    return (mean(distilled) - mean(pruned)) / -cost.value


def compare(metric: str, items: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """A benchmark's figures for the manifest.

    Args:
        metric: Metric to compare; higher is better.
        items: Each role's items, the same in the same order, with their ``metrics``.

    Returns:
        ``metric``, ``items``, each role's ``value`` and ``standard_error``, paired ``differences``
        to the teacher with 95% intervals, and ``recovered``.
    """
    values = {role: [item["metrics"][metric] for item in items[role]] for role in ROLES}
    return {
        "metric": metric,
        "items": len(values["teacher"]),
        **{
            role: {"value": mean(each), "standard_error": standard_error(each)}
            for role, each in values.items()
        },
        "differences": {
            role: asdict(difference(values[role], values["teacher"]))
            for role in ("distilled", "pruned")
        },
        "recovered": recovered(*(values[role] for role in ROLES)),
    }
