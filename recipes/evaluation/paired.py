"""Statistics of figures that were measured on the same items: means, and paired differences.

Two models that answer the same questions mostly fail on the same ones. Differences item by item
leave that shared part out, so their interval is narrower than two bare means would allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recipes.core.statistics import difference, mean, standard_error
from recipes.evaluation.results import ROLES, Differences, Item, Score, TaskScores


def recovered(
    teacher: Sequence[float], pruned: Sequence[float], distilled: Sequence[float]
) -> float | None:
    """Share of what pruning cost that distillation won back: 1 is the teacher, 0 the pruned model.

    Figures are of the same items, and higher ones are better; of losses, give the negative ones.

    ``None`` where pruning cost less than noise, that is, where the 95% interval of its paired
    difference to the teacher reaches 0: a share of nothing says nothing.
    """
    cost = difference(pruned, teacher)
    if cost.high >= 0:
        return None
    return (mean(distilled) - mean(pruned)) / -cost.value


def compare(metric: str, items: Mapping[str, Sequence[Item]]) -> TaskScores:
    """A benchmark's figures, with differences to the teacher.

    Args:
        metric: Metric to compare; higher is better.
        items: Each role's items, the same in the same order, with their metrics.
    """
    values = {role: [item.metrics[metric] for item in items[role]] for role in ROLES}
    teacher, pruned, distilled = (values[role] for role in ROLES)
    return TaskScores(
        metric,
        len(teacher),
        teacher=_score(teacher),
        pruned=_score(pruned),
        distilled=_score(distilled),
        differences=Differences(difference(distilled, teacher), difference(pruned, teacher)),
        recovered=recovered(teacher, pruned, distilled),
    )


def _score(values: Sequence[float]) -> Score:
    return Score(mean(values), standard_error(values))
