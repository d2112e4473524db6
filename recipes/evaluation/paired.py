"""Compares models on the same items, by means and paired differences.

Two models mostly fail on the same questions. Differences item by item exclude what they share, so
their interval is narrower than that of two separate means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from recipes.core.statistics import difference, standard_error
from recipes.evaluation.results import ROLES, Differences, Item, Score, TaskScores


def recovered(
    teacher: Sequence[float], pruned: Sequence[float], distilled: Sequence[float]
) -> float | None:
    """Returns the fraction of the pruning loss that distillation recovered: 1 equals the teacher.

    Values are of the same items, and higher ones are better; negate losses. ``None`` where the 95%
    interval of the paired difference between pruned model and teacher reaches 0: there is then no
    significant loss to recover.
    """
    cost = difference(pruned, teacher)
    if cost.high >= 0:
        return None
    return (fmean(distilled) - fmean(pruned)) / -cost.value


def compare(metric: str, items: Mapping[str, Sequence[Item]]) -> TaskScores:
    """Compares each role's items, which are the same in the same order, by a metric."""
    return _compare(metric, {role: [i.metrics[metric] for i in items[role]] for role in ROLES})


def compare_answers(items: Mapping[str, Sequence[Item]]) -> TaskScores | None:
    """Compares models by the log-likelihoods of the right answers, in nats.

    They show smaller differences on the same number of items than accuracy does. A softmax over the
    choices would be as noisy as accuracy, so the answer's own log-likelihood is used.

    Returns:
        ``None`` where items have no log-likelihoods, because the model writes its answer.
    """
    values: dict[str, list[float]] = {role: [] for role in ROLES}
    for role in ROLES:
        for item in items[role]:
            choice = item.target if isinstance(item.target, int) else 0
            response = item.response[choice] if isinstance(item.response, list) else None
            if not isinstance(response, list):
                return None
            values[role].append(float(response[0]))
    return _compare("log-likelihood of the right answer", values)


def _compare(metric: str, values: Mapping[str, Sequence[float]]) -> TaskScores:
    teacher, pruned, distilled = (values[role] for role in ROLES)
    return TaskScores(
        metric,
        len(teacher),
        **{role: Score(fmean(each), standard_error(each)) for role, each in values.items()},
        differences=Differences(difference(distilled, teacher), difference(pruned, teacher)),
        recovered=recovered(teacher, pruned, distilled),
    )
