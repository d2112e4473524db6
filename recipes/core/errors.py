"""The error that users see: what is wrong and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecipeError(Exception):
    """Bad input or a failed check. Users see its message without a traceback.

    Args:
        what: What is wrong.
        fix: How to fix it; empty only if ``what`` already says so.
    """

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what}\n  fix: {fix}" if fix else what)

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str, str]]:
        """Makes the error survive pickling, by which it crosses processes and threads."""
        return type(self), (self.what, self.fix)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"``, or an empty string when nothing is close."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def require_known(name: str, known: Iterable[str], what: str) -> None:
    """Checks that a name is known.

    Args:
        name: The name.
        known: All names.
        what: What is wrong if it is not one of them, without a full stop.

    Raises:
        RecipeError: It is unknown; the message has the nearest known name.
    """
    if name not in (choices := list(known)):
        raise RecipeError(
            f"{what}.{did_you_mean(name, choices)}", f"use one of: {', '.join(choices)}"
        )
