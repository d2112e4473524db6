"""Statistics against values that can be worked out by hand."""

from __future__ import annotations

import math
from statistics import fmean

import pytest

from recipes.core.statistics import difference, standard_error
from recipes.evaluation.paired import compare, compare_answers, recovered
from recipes.evaluation.results import Item

RIGHT, WRONG = [1.0], [0.0]


def test_mean_and_standard_error() -> None:
    # Sample variance of 2, 4, 4, 4, 5, 5, 7, 9 is 32/7, so its mean has √(32/7/8) = 0.7559.
    values = [2.0, 4, 4, 4, 5, 5, 7, 9]
    assert fmean(values) == 5
    assert standard_error(values) == pytest.approx(math.sqrt(32 / 7 / 8))
    assert standard_error([3.0]) == 0


def test_standard_error_of_answers_is_the_binomial_one() -> None:
    values = RIGHT * 70 + WRONG * 30
    assert standard_error(values) == pytest.approx(math.sqrt(0.7 * 0.3 / 99))


def test_paired_difference_of_a_known_case() -> None:
    # 100 items: 60 both right, 10 both wrong, 10 won and 20 lost. The differences are 10 times 1,
    # 20 times -1 and 70 times 0: mean -0.1, sample variance (30 - 100 * 0.01) / 99 = 29 / 99.
    ours = RIGHT * 60 + WRONG * 10 + RIGHT * 10 + WRONG * 20
    theirs = RIGHT * 60 + WRONG * 10 + WRONG * 10 + RIGHT * 20
    found = difference(ours, theirs)
    margin = 1.959964 * math.sqrt(29 / 99 / 100)
    assert found.value == pytest.approx(-0.1)
    assert found.low == pytest.approx(-0.1 - margin, abs=1e-6)
    assert found.high == pytest.approx(-0.1 + margin, abs=1e-6)


def test_pairing_leaves_out_what_items_have_in_common() -> None:
    hard_and_easy = RIGHT * 50 + WRONG * 50
    better = RIGHT * 55 + WRONG * 45
    paired = difference(better, hard_and_easy)
    apart = 1.96 * math.hypot(standard_error(better), standard_error(hard_and_easy))
    assert paired.low > 0 > paired.value - apart


def test_difference_needs_the_same_items() -> None:
    with pytest.raises(ValueError, match="shorter"):
        difference([1.0, 0.0], [1.0])


def test_recovered_is_a_share_of_what_pruning_cost() -> None:
    teacher, pruned, distilled = (RIGHT * n + WRONG * (100 - n) for n in (80, 40, 70))
    assert recovered(teacher, pruned, distilled) == pytest.approx(0.75)
    assert recovered(teacher, pruned, teacher) == pytest.approx(1)
    assert recovered(teacher, pruned, pruned) == 0
    assert recovered(teacher, pruned, WRONG * 100) == pytest.approx(-1)


@pytest.mark.parametrize("won_by_pruning", [0, 20, 21, 40])
def test_recovered_is_none_where_pruning_cost_no_more_than_noise(won_by_pruning: int) -> None:
    teacher = RIGHT * 40 + WRONG * 60
    pruned = WRONG * 30 + RIGHT * 10 + RIGHT * won_by_pruning + WRONG * (60 - won_by_pruning)
    cost = difference(pruned, teacher)
    assert (recovered(teacher, pruned, teacher) is None) == (cost.high >= 0)
    assert (cost.high >= 0) == (won_by_pruning >= 20)


def test_comparison_is_of_one_metric() -> None:
    def items(*values: float) -> list[Item]:
        return [Item("", "", "", "", "", {"acc": value, "other": 7.0}) for value in values]

    found = compare(
        "acc",
        {
            "teacher": items(1, 1, 1, 1, 0),
            "pruned": items(0, 0, 0, 0, 0),
            "distilled": items(1, 1, 0, 1, 0),
        },
    )
    assert (found.metric, found.items) == ("acc", 5)
    assert found.teacher.value == pytest.approx(0.8)
    assert found.distilled.standard_error == pytest.approx(math.sqrt(0.3 / 5))
    assert found.differences.pruned.value == pytest.approx(-0.8)
    assert found.differences.distilled.value == pytest.approx(-0.2)
    assert found.recovered == pytest.approx(0.75)


def test_a_difference_that_items_can_show() -> None:
    """2.80 standard errors: 1.96 to be sure of it, and 0.84 to see it four times in five."""
    found = difference([0.0, 2.0] * 50, [0.0] * 100)
    error = standard_error([0.0, 2.0] * 50)
    assert found.detectable == pytest.approx(2.801585 * error, rel=1e-6)


def test_right_answers_are_compared_by_their_log_likelihoods() -> None:
    """Of the choice that is right, or of the one continuation that there is."""

    def item(target: object, *likelihoods: float) -> Item:
        said = [[value, False] for value in likelihoods]
        return Item("task/0", "hash", {}, target, said, {"acc": 0.0})

    items = {
        "teacher": [item(1, -5, -2), item(" word", -3)],
        "pruned": [item(1, -5, -6), item(" word", -7)],
        "distilled": [item(1, -1, -3), item(" word", -4)],
    }
    found = compare_answers(items)
    assert found is not None
    assert {role: score.value for role, score in found.models().items()} == {
        "teacher": -2.5,
        "pruned": -6.5,
        "distilled": -3.5,
    }
    assert found.differences.distilled.value == -1
    assert found.recovered == pytest.approx(0.75)
    written = Item("task/0", "hash", {}, "18", ["The answer is 18."], {"exact_match": 1.0})
    assert compare_answers({role: [written] for role in items}) is None
