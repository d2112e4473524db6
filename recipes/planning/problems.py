"""What preflight finds: a rule that is broken, what is wrong, and how to fix it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from recipes.core.errors import RecipeError
from recipes.planning.rules import ERROR, Rule


@dataclass(frozen=True)
class Problem:
    """A rule that a recipe breaks, what is wrong, and how to fix it."""

    rule: Rule
    what: str
    fix: str

    def __str__(self) -> str:
        see = f"\n  see: {self.rule.reference}" if self.rule.reference else ""
        return f"{self.what}\n  fix: {self.fix}   [{self.rule.name}]{see}"


def require_none(problems: Iterable[Problem], skipped: Collection[str] = ()) -> tuple[Problem, ...]:
    """What was found; refuses an error among it, unless its rule is ``skipped``."""
    found = tuple(dict.fromkeys(problems))
    stopping = [str(p) for p in found if p.rule.severity == ERROR and p.rule.name not in skipped]
    if stopping:
        raise RecipeError("\n".join(stopping), fix="")
    return found
