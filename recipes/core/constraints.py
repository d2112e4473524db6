"""Constraints of settings, declared with their fields and checked before anything starts.

The type of a field is its constraint: ``max_steps: Count``, ``lr: Positive``. OmegaConf sees the
plain type and converts the value; pydantic then checks it.
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
"""Largest integer of kernels and file formats."""
REQUIREMENT = "requirement"
"""Error type of the requirements in words below."""


def integer(least: int, most: int = INT32) -> Any:
    """Declares an integer from ``least`` to ``most``."""
    return Field(ge=least, le=most)


def between(least: float, most: float) -> Any:
    """Declares a number from ``least`` to ``most``."""
    return Field(ge=least, le=most, allow_inf_nan=False)


def _must_be(description: str) -> PydanticCustomError:
    return PydanticCustomError(REQUIREMENT, "{must}", {"must": f"must be {description}"})


@dataclass(frozen=True)
class OneOf:
    """Accepts certain names."""

    names: tuple[str, ...]

    def __call__(self, value: str) -> str:
        """Returns an accepted value."""
        if value not in self.names:
            near = did_you_mean(value, self.names)
            raise _must_be(f"one of: {', '.join(self.names)}.{near}")
        return value


@dataclass(frozen=True)
class Matching:
    """Accepts texts that match a regular expression, which errors describe in words."""

    pattern: str
    description: str

    def __call__(self, value: str) -> str:
        """Returns an accepted value."""
        if not re.fullmatch(self.pattern, value):
            raise _must_be(self.description)
        return value


@dataclass(frozen=True)
class CountOrFraction:
    """Accepts a count, or a fraction of a whole."""

    description: str = "an integer, 1 or more, or a fraction below 1, such as 0.75"

    def __call__(self, value: float) -> float:
        """Returns an accepted value."""
        if not (0 < value < 1 if isinstance(value, float) else 1 <= value <= INT32):
            raise _must_be(self.description)
        return value


def one_of(*names: str) -> AfterValidator:
    """Declares a text that is one of some names."""
    return AfterValidator(OneOf(names))


def matching(pattern: str, description: str) -> AfterValidator:
    """Declares a text that matches a regular expression."""
    return AfterValidator(Matching(pattern, description))


Count = Annotated[int, integer(1)]
CountOrZero = Annotated[int, integer(0)]
Tokens = Annotated[int, integer(1, 10**15)]
Seed = Annotated[int, integer(0, 2**32 - 1)]
"""NumPy's range, the narrowest of the libraries that take a seed."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, between(1e-6, 1 - 1e-6)]
"""Neither nothing nor all."""
Size = Annotated[int | float, AfterValidator(CountOrFraction())]
"""Size of a pruned model, or its fraction of the teacher's."""
Rate = Annotated[float, between(1e6, 1e24)]
"""FLOPs or bytes per second."""
Bytes = Annotated[float, Field(ge=1e6)]
"""Size of a memory; infinite if unknown."""
Threads = Annotated[int, integer(1, 4096)]
Duration = Annotated[
    str,
    matching(r"(\d+-)?\d{1,2}:[0-5]\d:[0-5]\d", "HH:MM:SS or D-HH:MM:SS, in quotes in a YAML file"),
]
"""A time limit in Slurm's format."""
Variable = Annotated[str, matching(r"[A-Za-z_]\w*", "the name of an environment variable")]
Environment = dict[Variable, str]

MESSAGES = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "finite_number": "must be finite",
    "too_short": "must not be empty",
    "list_type": "must be a list, such as [a,b]",
    "string_type": "must be a text",
    "dict_type": "must be names with values, such as {{a: 1}}",
    REQUIREMENT: "{must}",
}
"""Messages by pydantic's type of error."""


@cache
def _adapter(declared: type[DataclassInstance]) -> TypeAdapter[Any]:
    return TypeAdapter(declared)


def violations(settings: DataclassInstance, where: str = "") -> Iterator[str]:
    """Yields a message for each invalid field of settings at ``where`` in the config."""
    try:
        _adapter(type(settings)).validate_python(asdict(settings))
    except ValidationError as error:
        yield from (_message(details, where) for details in error.errors())


def _message(details: ErrorDetails, where: str) -> str:
    name = where + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in details["loc"])
    context = details.get("ctx", {})
    values = {k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()}
    message = MESSAGES.get(details["type"])
    must = message.format(**values) if message else details["msg"]
    return f"invalid {name.strip('.')}={details['input']}: {must}"
