"""Compares results of paired comparisons with values that were computed by hand."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from statistics import fmean

import pytest
from scipy.special import stdtrit

from recipes.core.statistics import difference, margin95, standard_error
from recipes.evaluation.results import ROLES, Item, compare_answers, compare_scores, recovered

RIGHT, WRONG = [1.0], [0.0]


def test_standard_error_of_a_mean() -> None:
    values = [2.0, 4, 4, 4, 5, 5, 7, 9]  # with a sample variance of 32/7
    assert fmean(values) == 5
    assert standard_error(values) == pytest.approx(math.sqrt(32 / 7 / 8))
    assert standard_error([3.0]) is None
    assert standard_error(RIGHT * 70 + WRONG * 30) == pytest.approx(math.sqrt(0.7 * 0.3 / 99))


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
    # 2.80 standard errors: 1.96 for significance, and 0.84 for a power of 80%.
    assert paired.detectable == pytest.approx(2.801585 * error, rel=0.02)
    with pytest.raises(ValueError, match="shorter"):
        difference([1.0, 0.0], [1.0])


@pytest.mark.parametrize("items", [2, 4, 10])
def test_intervals_of_a_few_items_contain_the_true_difference_in_95_percent(items: int) -> None:
    draws, zeros = random.Random(0), [0.0] * items
    samples = ([draws.gauss(0, 1) for _ in zeros] for _ in range(4000))
    intervals = [difference(sample, zeros) for sample in samples]
    assert fmean(not (i.is_negative or i.is_positive) for i in intervals) == pytest.approx(
        0.95, abs=0.012
    )


@pytest.mark.parametrize(("items", "margin"), [(2, 1.0), (100, 0.03)])
def test_equal_scores_have_an_interval_by_the_rule_of_three(items: int, margin: float) -> None:
    same = difference(RIGHT * items, RIGHT * items)
    assert (same.value, same.low, same.high) == pytest.approx((0, -margin, margin))
    worse = difference(WRONG * items, RIGHT * items)
    assert (worse.low, worse.high) == pytest.approx((-1, 3 / items - 1))
    assert worse.is_negative == (items == 100)
    losses = difference([3.25] * items, [3.0] * items)
    assert (losses.low, losses.high) == (0.25, 0.25), "losses keep Student's t"


def test_one_item_is_not_significant() -> None:
    change = difference([2.0], [1.0])
    assert (change.value, change.low, change.high, change.detectable) == (1, None, None, None)
    assert not change.is_positive
    assert recovered([2.0], [1.0], [1.5]) is None
    items = {role: [Item("", "", "", "", "", {"acc": 1.0})] for role in ROLES}
    json.dumps(asdict(compare_scores("acc", items)), allow_nan=False)  # JSON has no infinity


@pytest.mark.parametrize("values", [2, 3, 4, 9, 10, 40, 1000, 14042])
def test_few_values_have_wide_intervals(values: int) -> None:
    assert margin95(1.0, values) == pytest.approx(stdtrit(values - 1, 0.975), abs=1e-6)


def test_recovered_is_the_restored_fraction_of_what_pruning_lost() -> None:
    teacher, pruned, distilled = (RIGHT * n + WRONG * (100 - n) for n in (80, 40, 70))
    assert recovered(teacher, pruned, distilled) == pytest.approx(0.75)
    assert recovered(teacher, pruned, WRONG * 100) == pytest.approx(-1)


@pytest.mark.parametrize("gained", [0, 20, 21, 40])
def test_recovered_is_none_if_pruning_lost_nothing_significant(gained: int) -> None:
    """The pruned model loses 30 of the teacher's right answers, and gains ``gained`` others."""
    teacher = RIGHT * 40 + WRONG * 60
    pruned = WRONG * 30 + RIGHT * 10 + RIGHT * gained + WRONG * (60 - gained)
    change = difference(pruned, teacher)
    assert (recovered(teacher, pruned, teacher) is None) == (not change.is_negative)
    assert change.is_negative == (gained < 20)


def test_models_are_compared_by_a_metric() -> None:
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
    assert scores.recovered == pytest.approx(0.75)


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
    assert [score.value for score in scores.models().values()] == [-2.5, -6.5, -3.5]
    assert scores.differences.distilled.value == -1
    assert scores.recovered == pytest.approx(0.75)
    several = [item(" word", -1, -2)]  # whose right choice is not known
    assert compare_answers(dict.fromkeys(items, several)) is None
    generated = Item("task/0", "hash", {}, "18", ["The answer is 18."], {"exact_match": 1.0})
    assert compare_answers({role: [generated] for role in items}) is None
