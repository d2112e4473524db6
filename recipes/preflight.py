"""What a stage's ``check`` sees, and what it says: rules that need no torch and take no time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from recipes.architecture import Architecture, read_architecture
from recipes.errors import RecipeError
from recipes.sources import read_hf_config
from recipes.stage import StageConfig


@dataclass(frozen=True)
class Problem:
    """A rule that a recipe breaks: its name, what is wrong, and how to fix it."""

    rule: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}   [{self.rule}]"


@dataclass(frozen=True)
class Chain:
    """The whole chain, as far as it is known before anything runs."""

    hf_path: str
    teacher: Architecture
    stages: Mapping[str, StageConfig]


def read_chain(hf_path: str | None, stages: Mapping[str, StageConfig]) -> Chain:
    """Reads the teacher's shape from its ``config.json``.

    Raises:
        RecipeError: There is no usable teacher.
    """
    if not hf_path:
        raise RecipeError("no model is set.", "model=NAME or model.hf_path=DIR_OR_HUB_ID")
    teacher = read_architecture(read_hf_config(hf_path), hf_path)
    return Chain(hf_path, teacher, stages)


def require_none(problems: Iterable[Problem]) -> None:
    """Raises one ``RecipeError`` that lists all problems, if there are any."""
    found = [str(problem) for problem in problems]
    if found:
        raise RecipeError("\n".join(found))
