"""Tests paired comparisons of models against values that were computed by hand."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from statistics import fmean

import pytest
from scipy.special import stdtrit

from recipes.core.statistics import difference, margin95, perplexity, standard_error
from recipes.evaluation.results import (
    ROLES,
    Item,
    answer_values,
    compare_answers,
    compare_scores,
    recovered,
)

RIGHT, WRONG = [1.0], [0.0]
"""Score of one right and of one wrong answer, as lists: ``RIGHT * 3`` are three right answers."""


def test_standard_error_of_a_mean() -> None:
    values = [2.0, 4, 4, 4, 5, 5, 7, 9]  # their sample variance is 32 / 7
    assert fmean(values) == 5
    assert standard_error(values) == pytest.approx(math.sqrt(32 / 7 / 8))
    assert standard_error([3.0]) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_has_no_interval(loss: float) -> None:
    paired = difference([loss, 1.0, 2.0], [1.0, 1.0, 1.0])
    assert not math.isfinite(paired.value)
    assert not paired.is_negative
    assert not paired.is_positive


def test_the_perplexity_of_a_huge_loss_is_infinite() -> None:
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(800.0) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_paired_difference_of_100_items() -> None:
    # In 60 items both models are right, in 10 both are wrong, in 10 only the student is right and
    # in 20 only the teacher. The differences are 10 times 1, 20 times -1 and 70 times 0. Their mean
    # is -0.1, and their sample variance is (30 - 100 * 0.01) / 99 = 29 / 99.
    student = RIGHT * 60 + WRONG * 10 + RIGHT * 10 + WRONG * 20
    teacher = RIGHT * 60 + WRONG * 10 + WRONG * 10 + RIGHT * 20
    paired, error = difference(student, teacher), math.sqrt(29 / 99 / 100)
    # 1.984 is the quantile of Student's t with 99 degrees of freedom.
    interval = (-0.1, -0.1 - 1.984217 * error, -0.1 + 1.984217 * error)
    assert (paired.value, paired.low, paired.high) == pytest.approx(interval, abs=1e-6)
    # The smallest difference that is found with a power of 80%: 1.96 + 0.84 standard errors. With
    # Student's t, the interval has 1.984 instead of 1.960, so ``detectable`` is 1.2% larger.
    assert paired.detectable == pytest.approx(2.801585 * error, rel=0.02)
    with pytest.raises(ValueError, match="shorter"):
        difference([1.0, 0.0], [1.0])


@pytest.mark.parametrize("items", [2, 4, 10])
def test_intervals_of_a_few_items_contain_the_true_difference_in_95_percent(items: int) -> None:
    generator, zeros = random.Random(0), [0.0] * items
    samples = ([generator.gauss(0, 1) for _ in zeros] for _ in range(4000))
    intervals = [difference(sample, zeros) for sample in samples]
    # The true difference is 0.
    coverage = fmean(not (i.is_negative or i.is_positive) for i in intervals)
    # 0.012 is 3.5 standard errors of the fraction: sqrt(0.95 * 0.05 / 4000) = 0.0034.
    assert coverage == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(("items", "margin"), [(2, 1.0), (100, 0.03)])
def test_equal_differences_have_an_interval_by_the_rule_of_three(items: int, margin: float) -> None:
    """The margin is 3 / items. The ends of the interval are limited to -1 and 1."""
    same = difference(RIGHT * items, RIGHT * items)
    assert (same.value, same.low, same.high) == pytest.approx((0, -margin, margin))
    worse = difference(WRONG * items, RIGHT * items)
    assert (worse.low, worse.high) == pytest.approx((-1, 3 / items - 1))
    assert worse.is_negative == (items == 100)  # two items are too few: 3 / 2 - 1 > 0
    losses = difference([3.25] * items, [3.0] * items)
    assert (losses.low, losses.high) == (0.25, 0.25), "the rule is only for scores in [0, 1]"


def test_one_item_is_not_significant() -> None:
    change = difference([2.0], [1.0])
    assert (change.value, change.low, change.high, change.detectable) == (1, None, None, None)
    assert not change.is_positive
    assert recovered([2.0], [1.0], [1.5]) is None
    items = {role: [Item("", "", "", "", "", {"acc": 1.0})] for role in ROLES}
    # Raises an error for an infinite interval, which JSON cannot represent.
    json.dumps(asdict(compare_scores("acc", items)), allow_nan=False)


@pytest.mark.parametrize("values", [2, 3, 4, 9, 10, 40, 1000, 14042])
def test_margin_equals_the_quantile_of_students_t(values: int) -> None:
    assert margin95(1.0, values) == pytest.approx(stdtrit(values - 1, 0.975), abs=1e-6)


def test_recovered_is_the_restored_fraction_of_what_pruning_lost() -> None:
    teacher, pruned, distilled = (RIGHT * right + WRONG * (100 - right) for right in (80, 40, 70))
    assert recovered(teacher, pruned, distilled) == pytest.approx(0.75)  # (70 - 40) / (80 - 40)
    assert recovered(teacher, pruned, WRONG * 100) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("gained", "significant"), [(0, True), (16, True), (17, False), (40, False)]
)
def test_recovered_is_none_if_pruning_lost_nothing_significant(
    gained: int, significant: bool
) -> None:
    """The pruned model loses 30 of the teacher's right answers, and gains ``gained`` others.

    The 95% intervals of pruned minus teacher are -0.3 ± 0.091, -0.14 ± 0.132, -0.13 ± 0.134 and
    0.1 ± 0.166.
    """
    teacher = RIGHT * 40 + WRONG * 60
    pruned = WRONG * 30 + RIGHT * 10 + RIGHT * gained + WRONG * (60 - gained)
    change = difference(pruned, teacher)
    assert change.is_negative == significant
    assert (recovered(teacher, pruned, teacher) is None) == (not significant)


def test_models_are_compared_by_a_metric() -> None:
    # Means: teacher 0.8, pruned 0, distilled 0.6. The sample variance of distilled is 0.3.
    values = {"teacher": (1, 1, 1, 1, 0), "pruned": (0,) * 5, "distilled": (1, 1, 0, 1, 0)}
    items = {
        role: [Item("", "", "", "", "", {"acc": value, "other": 7.0}) for value in row]
        for role, row in values.items()
    }
    scores = compare_scores("acc", items)
    assert (scores.metric, scores.items) == ("acc", 5)
    assert scores.teacher.value == pytest.approx(0.8)
    assert scores.distilled.standard_error == pytest.approx(math.sqrt(0.3 / 5))
    assert scores.differences.pruned.value == pytest.approx(-0.8)
    assert scores.differences.distilled.value == pytest.approx(-0.2)
    assert scores.recovered == pytest.approx(0.75)  # 0.6 / 0.8


def test_right_answers_are_compared_by_their_log_likelihoods() -> None:
    """The right answer is the choice at index ``target``, or the only continuation."""

    def item(target: object, *likelihoods: float) -> Item:
        response = [[value, False] for value in likelihoods]
        return Item("task/0", "hash", {}, target, response, {"acc": 0.0})

    items = {
        "teacher": [item(1, -5, -2), item(" word", -3)],
        "pruned": [item(1, -5, -6), item(" word", -7)],
        "distilled": [item(1, -1, -3), item(" word", -4)],
    }
    scores = compare_answers(items)
    assert scores is not None
    # The means of (-2, -3), (-6, -7) and (-3, -4).
    assert [score.value for score in scores.models().values()] == [-2.5, -6.5, -3.5]
    assert scores.differences.distilled.value == -1
    assert scores.recovered == pytest.approx(0.75)  # (-3.5 + 6.5) / (-2.5 + 6.5)
    # The target is text, and there are several responses: the right one is not known.
    ambiguous = [item(" word", -1, -2)]
    assert compare_answers(dict.fromkeys(items, ambiguous)) is None


@pytest.mark.parametrize(
    ("target", "response", "values"),
    [
        (0, [[-1.5, True]], [-1.5]),
        (1, [[-1.5, True]], None),  # there is only one choice
        (-1, [[-1.5, True]], None),  # no choice is right
        (1, ["yes"], None),  # generated text
    ],
)
def test_log_likelihoods_need_a_right_choice(
    target: int, response: list[object], values: list[float] | None
) -> None:
    item = Item("1", "hash", {}, target, response, {"acc": 1.0})
    assert answer_values([item]) == values
