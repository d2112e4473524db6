"""The error that users see: what is wrong and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecipeError(Exception):
    """Bad input or a failed check. Users see its message without a traceback.

    Args:
        what: What is wrong.
        fix: How to fix it; empty only if ``what`` already contains the fix.
    """

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what}\n  fix: {fix}" if fix else what)

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str, str]]:
        """Keeps both arguments when the error is pickled, for example by multiprocessing."""
        return type(self), (self.what, self.fix)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" with the most similar choice; "" if no choice is similar."""
    matches = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def require_known(name: str, known: Iterable[str], what: str) -> None:
    """Raises ``RecipeError`` if ``name`` is not one of the known names.

    ``what`` describes the error, without a final period. The message adds the most similar name.
    """
    if name not in (choices := list(known)):
        raise RecipeError(
            f"{what}.{did_you_mean(name, choices)}", f"use one of: {', '.join(choices)}"
        )
