"""Statistics of figures that were measured on the same items: means, and paired differences.

Two models that answer the same questions mostly fail on the same ones. Differences item by item
leave that shared part out, so their interval is narrower than two bare means would allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from recipes.core.statistics import difference, mean, standard_error

ROLES = ("teacher", "pruned", "distilled")


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
