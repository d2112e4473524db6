"""What a setting may be, declared with its field and checked before anything starts.

A field's type says it: ``max_steps: Count``, ``lr: Positive``. OmegaConf sees the plain type and
converts what was given; pydantic then holds the values against what is declared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from recipes.core.errors import did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic_core import ErrorDetails

INT32 = 2**31 - 1
"""The most that kernels and file formats count to."""


def whole(least: int, most: int = INT32) -> Any:
    """A whole number from ``least`` to ``most``."""
    return Field(ge=least, le=most)


def between(least: float, most: float) -> Any:
    """A number from ``least`` to ``most``."""
    return Field(ge=least, le=most, allow_inf_nan=False)


@dataclass(frozen=True)
class OneOf:
    """One of some names."""

    names: tuple[str, ...]

    def __call__(self, value: str) -> str:
        """Refuses any other."""
        if value not in self.names:
            fix = f"use one of: {', '.join(self.names)}.{did_you_mean(value, self.names)}"
            raise PydanticCustomError(FIX, "{fix}", {"fix": fix})
        return value


@dataclass(frozen=True)
class Matching:
    """A text of the form of a regular expression, which the error spares its reader."""

    pattern: str
    what: str

    def __call__(self, value: str) -> str:
        """Refuses any other."""
        if not re.fullmatch(self.pattern, value):
            raise PydanticCustomError(FIX, "{fix}", {"fix": f"give {self.what}"})
        return value


@dataclass(frozen=True)
class CountOrShare:
    """A number of things, or a share of those that there are."""

    what: str = "a whole number, 1 or more, or a share below 1, such as 0.75"

    def __call__(self, value: float) -> float:
        """Refuses any other."""
        if not (0 < value < 1 if isinstance(value, float) else 1 <= value <= INT32):
            raise PydanticCustomError(FIX, "{fix}", {"fix": f"give {self.what}"})
        return value


def one_of(*names: str) -> AfterValidator:
    """One of some names."""
    return AfterValidator(OneOf(names))


def matching(pattern: str, what: str) -> AfterValidator:
    """A text of the form of a regular expression, and what it is in words."""
    return AfterValidator(Matching(pattern, what))


FIX = "fix"
Count = Annotated[int, whole(1)]
"""A number of things, of which there is one at least."""
CountOrZero = Annotated[int, whole(0)]
Tokens = Annotated[int, whole(1, 10**15)]
Seed = Annotated[int, whole(0, 2**32 - 1)]
"""What NumPy takes, the narrowest of those that draw."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, between(1e-6, 1 - 1e-6)]
"""A part of something that leaves a rest."""

Size = Annotated[int | float, AfterValidator(CountOrShare())]
"""Of a model that is made smaller."""
Rate = Annotated[float, between(1e6, 1e24)]
"""FLOPs or bytes in a second: no machine of today is slower than a million."""
Bytes = Annotated[float, Field(ge=1e6)]
"""Of a memory; it may be infinite, which means unknown."""
Threads = Annotated[int, whole(1, 4096)]
Duration = Annotated[
    str,
    matching(r"(\d+-)?\d{1,2}:[0-5]\d:[0-5]\d", "HH:MM:SS or D-HH:MM:SS, in quotes in a YAML file"),
]
"""As Slurm writes it."""
Variable = Annotated[str, matching(r"[A-Za-z_]\w*", "the name of an environment variable")]
Environment = dict[Variable, str]

FIXES = {
    "greater_than": "use a number above {gt}",
    "greater_than_equal": "use {ge} or more",
    "less_than": "use a number below {lt}",
    "less_than_equal": "use {le} or less",
    "finite_number": "use a number, neither infinite nor nan",
    "too_short": "give at least one",
    "list_type": "give a list, such as [a,b]",
    "string_type": "give a text",
    "dict_type": "give names with values, such as {a: 1}",
    FIX: "{fix}",
}
"""What to do about each kind of pydantic's errors that a declaration here can lead to."""


@cache
def _adapter(declared: type[DataclassInstance]) -> TypeAdapter[Any]:
    return TypeAdapter(declared)


def violations(settings: DataclassInstance, where: str = "") -> Iterator[str]:
    """Yields what is wrong with settings at ``where`` in the config, and how to mend it."""
    try:
        _adapter(type(settings)).validate_python(asdict(settings))
    except ValidationError as error:
        yield from (_message(found, where) for found in error.errors())


def _message(found: ErrorDetails, where: str) -> str:
    name = where + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in found["loc"])
    context = found.get("ctx", {})
    shown = {k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()}
    fix = FIXES.get(found["type"], found["msg"]).format(**shown)
    return f"{name.strip('.')}={found['input']} cannot be\n  fix: {fix}"
