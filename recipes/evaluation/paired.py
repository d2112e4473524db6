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
    """A benchmark's figures in a metric of which more is better, with differences to the teacher.

    ``items`` are each role's, the same in the same order.
    """
    return _compare(metric, {role: [i.metrics[metric] for i in items[role]] for role in ROLES})


def answers(items: Mapping[str, Sequence[Item]]) -> TaskScores | None:
    """Models by the log-likelihoods of the right answers, in nats.

    It says more of every item than whether the right answer was the likeliest, so it shows smaller
    differences on as many items. It is of the answer as it is written, whatever the other choices
    are: a softmax over the choices is as noisy as the score.

    Returns:
        ``None`` where an item has no log-likelihoods, as where a model writes its answer.
    """
    values = {role: [right_answer(item) for item in items[role]] for role in ROLES}
    known = {role: [v for v in each if v is not None] for role, each in values.items()}
    if known != values:
        return None
    return _compare("log-likelihood of the right answer", known)


def right_answer(item: Item) -> float | None:
    """Log-likelihood of what is right, in nats; see ``answers``."""
    choice = item.target if isinstance(item.target, int) else 0
    said = item.response[choice] if isinstance(item.response, list) else None
    return float(said[0]) if isinstance(said, list) else None


def _compare(metric: str, values: Mapping[str, Sequence[float]]) -> TaskScores:
    teacher, pruned, distilled = (values[role] for role in ROLES)
    return TaskScores(
        metric,
        len(teacher),
        **{role: Score(mean(each), standard_error(each)) for role, each in values.items()},
        differences=Differences(difference(distilled, teacher), difference(pruned, teacher)),
        recovered=recovered(teacher, pruned, distilled),
    )
