"""Detects a teacher with random weights: they were not loaded, or belong to another model."""

from __future__ import annotations

import math

from recipes.core.errors import RecipeError

CHANCE_FRACTION = 0.8
"""A teacher whose loss is above this fraction of ln(vocabulary) is hardly better than chance."""


def require_better_than_chance(loss: float, vocabulary: int, fix: str = "") -> None:
    """Raises ``RecipeError`` if a teacher's next-token loss, in nats, is near chance."""
    chance = math.log(vocabulary)
    if not loss < CHANCE_FRACTION * chance:  # also catches NaN
        raise RecipeError(
            f"the teacher's loss is {loss:.2f}, hardly below chance ({chance:.2f}).",
            "use text of the teacher's language, or correct weights" + fix,
        )
