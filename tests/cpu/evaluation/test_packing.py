"""Tests which questions of a benchmark are packed together, and on which rank."""

from __future__ import annotations

import pytest

from recipes.core.errors import RecipeError
from recipes.evaluation.packing import group_by_context, packs_of_rank


def test_an_answer_must_fit_into_the_model() -> None:
    """The longest answer leaves one token of the context, as in HFLM."""
    [question] = group_by_context([(None, [1, 2, 3], [4] * 8)], max_length=8)
    assert question.context == (3,)
    with pytest.raises(RecipeError, match="9 tokens"):
        group_by_context([(None, [1, 2, 3], [4] * 9)], max_length=8)


def test_empty_prompts_are_refused() -> None:
    assert len(group_by_context([(("a", "b"), [1], [2])], 8)) == 1
    with pytest.raises(RecipeError, match="empty prompt"):
        group_by_context([(("", "b"), [], [2])], 8)


def test_several_ranks_split_the_packs_of_one_rank() -> None:
    """Groups 0 and 1 have a prefix of 81 tokens. Those of other groups (6 tokens) are too short."""
    requests = [
        (None, [group] * (80 if group < 2 else 5) + [group, item], [choice] * (1 + item % 3))
        for group in range(20)
        for item in range(9)
        for choice in range(2)
    ]

    def packs(rank: int, ranks: int) -> list[tuple[int, tuple[int, ...]]]:
        """Returns the length of the prefix and the indices of requests, for each pack of a rank."""
        groups = packs_of_rank(requests, 4096, 50, rank, ranks)
        return [
            (len(prefix), tuple(n for question in pack for n in question.requests))
            for prefix, rank_packs in groups
            for pack in rank_packs
        ]

    all_packs = packs(0, 1)
    assert sorted(n for _, numbers in all_packs for n in numbers) == list(range(len(requests)))
    assert {length for length, _ in all_packs} == {0, 81}
    for ranks in (2, 3, 8):
        by_rank = [packs(rank, ranks) for rank in range(ranks)]
        assert [pack for rank_packs in by_rank for pack in rank_packs] == all_packs
        assert max(map(len, by_rank)) < 1.5 * len(all_packs) / ranks
    ranks_with_packs = [rank for rank in range(99) if packs(rank, 99)]
    assert len(ranks_with_packs) == len(all_packs)  # one each, because there are fewer packs
