from __future__ import annotations

import pytest

from recipes.core.errors import RecipeError, did_you_mean


def test_error_shows_the_fix_on_its_own_line() -> None:
    assert str(RecipeError("it broke", "mend it")) == "it broke\n  fix: mend it"
    assert str(RecipeError("it broke", "")) == "it broke"


@pytest.mark.parametrize(
    ("word", "expected"),
    [("distil", " Did you mean 'distill'?"), ("prnue", " Did you mean 'prune'?"), ("xyz", "")],
)
def test_only_a_similar_name_is_suggested(word: str, expected: str) -> None:
    # The suggestion starts with a space, because it is appended to a message.
    assert did_you_mean(word, iter(("prune", "distill"))) == expected
