"""Weights on their way into a checkpoint: in order, and at most one ahead of the writer."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event

import pytest
import torch
from torch import Tensor

from nemo_convert.streaming import Place, Weight, _one_ahead
from recipes.core.errors import RecipeError

WANTED: list[Weight] = [("a", (0,)), ("a", (1,)), ("b", (0,)), ("b", (1,))]


@pytest.fixture
def begun() -> dict[Weight, Event]:
    """Is set once a weight is being made."""
    return {weight: Event() for weight in WANTED}


@pytest.fixture
def source(begun: dict[Weight, Event]) -> Callable[[str, Place], Tensor]:
    """Gives parts of one large tensor, as a mapped file does."""
    stored = torch.arange(8.0).view(4, 2)

    def make(key: str, place: Place) -> Tensor:
        begun[key, place].set()
        return stored[WANTED.index((key, place))]

    return make


def test_one_weight_is_made_while_another_is_written(
    source: Callable[[str, Place], Tensor], begun: dict[Weight, Event]
) -> None:
    for number, (weight, made) in enumerate(_one_ahead(source, WANTED)):
        assert weight == WANTED[number]
        assert made.tolist() == [2.0 * number, 2.0 * number + 1]
        assert made.untyped_storage().nbytes() == made.nbytes  # nothing is left to be read
        for ahead in WANTED[number + 1 : number + 2]:
            assert begun[ahead].wait(60)
        assert not any(begun[later].is_set() for later in WANTED[number + 2 :])


def test_what_a_weight_is_refused_for_is_raised_where_it_is_wanted(
    source: Callable[[str, Place], Tensor],
) -> None:
    def refuse(key: str, place: Place) -> Tensor:
        if (key, place) == WANTED[1]:
            raise RecipeError("a weight is not there")
        return source(key, place)

    weights = _one_ahead(refuse, WANTED)
    assert next(weights)[0] == WANTED[0]
    with pytest.raises(RecipeError, match="not there"):
        next(weights)


def test_a_checkpoint_without_weights_of_its_own_asks_for_none(
    source: Callable[[str, Place], Tensor],
) -> None:
    assert list(_one_ahead(source, [])) == []
