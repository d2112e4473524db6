"""A teacher can be silently random: its weights were never loaded, or are of another model."""

from __future__ import annotations

import math

from recipes.core.errors import RecipeError

RANDOM_SHARE = 0.8
"""A teacher whose loss is above this share of ln(vocabulary) predicts little better than chance."""


def require_better_than_chance(loss: float, vocabulary: int) -> None:
    """Refuses a teacher that knows nothing, by its next-token loss on some text, in nats."""
    limit = RANDOM_SHARE * math.log(vocabulary)
    if not loss < limit:
        raise RecipeError(
            f"the teacher's loss on the first batch is {loss:.2f}; a working model is well below "
            f"{limit:.2f} (chance is {limit / RANDOM_SHARE:.2f}).",
            "its weights are damaged or of another model, or the text is not of its language",
        )
