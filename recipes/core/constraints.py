"""Types of settings with constraints, such as ``max_steps: Count`` or ``lr: Positive``.

OmegaConf converts a value to the type. The plan then checks all constraints with pydantic, before
any stage starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from recipes.core.errors import did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic_core import ErrorDetails

INT32 = 2**31 - 1
"""Largest signed 32-bit integer, the limit of many kernels and file formats."""
COMPUTED = {"computed": True}
"""Metadata of a setting that the program sets, so that a user must leave it out."""
REQUIREMENT = "requirement"
"""Error type, in pydantic, of a value that a ``Requirement`` does not accept."""


def integer(least: int, most: int = INT32) -> Any:
    """Returns the constraint of an integer from ``least`` to ``most``, both included."""
    return Field(ge=least, le=most)


def between(least: float, most: float) -> Any:
    """Returns the constraint of a number from ``least`` to ``most``, both included."""
    return Field(ge=least, le=most, allow_inf_nan=False)


@dataclass(frozen=True)
class Requirement:
    """A constraint that accepts the values for which ``test`` returns true."""

    test: Callable[[Any], bool]
    description: str
    """Describes the accepted values in errors and in the table of all settings."""
    names: tuple[str, ...] = ()
    """All accepted values, if they can be listed; an error suggests the most similar one."""

    def __call__(self, value: Any) -> Any:
        """Returns the value if it is accepted, as pydantic requires of validators."""
        if self.test(value):
            return value
        suggestion = did_you_mean(value, self.names) if self.names else ""
        message = f"must be {self.description}{suggestion}"
        # The second argument is a template, the third has its values.
        raise PydanticCustomError(REQUIREMENT, "{must}", {"must": message})


def one_of(*names: str) -> AfterValidator:
    """Returns the constraint of a string that must equal one of the names."""
    return AfterValidator(Requirement(names.__contains__, f"one of: {', '.join(names)}.", names))


def matching(pattern: str, description: str) -> AfterValidator:
    """Returns the constraint of a string that must match a regular expression as a whole."""
    regex = re.compile(pattern)
    return AfterValidator(Requirement(lambda text: bool(regex.fullmatch(text)), description))


def _is_size(value: float) -> bool:
    """Returns whether a number is an integer from 1, or a float between 0 and 1."""
    return 0 < value < 1 if isinstance(value, float) else 1 <= value <= INT32


Count = Annotated[int, integer(1)]
CountOrZero = Annotated[int, integer(0)]
Tokens = Annotated[int, integer(1, 10**15)]
Seed = Annotated[int, integer(0, 2**32 - 1)]
"""The upper limit is NumPy's. The other libraries that take a seed accept larger seeds."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MAX_WEIGHT = 1e6
"""Largest weight in a data blend. Sums of unlimited weights could be infinite."""
BlendWeight = Annotated[float, Field(gt=0, le=MAX_WEIGHT, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, between(1e-6, 1 - 1e-6)]
"""A number between 0 and 1, at least 1e-6 away from both."""
Size = Annotated[
    int | float,
    AfterValidator(
        Requirement(_is_size, "an integer, 1 or more, or a fraction below 1, such as 0.75")
    ),
]
"""A size of a pruned model, such as its width. An integer is the size itself. A float is a fraction
of the teacher's size."""
Rate = Annotated[float, between(1e6, 1e24)]
"""FLOPs or bytes per second."""
Bytes = Annotated[float, Field(ge=1e6)]
"""Memory in bytes; infinite if unknown."""
Threads = Annotated[int, integer(1, 4096)]
Duration = Annotated[
    str,
    matching(  # the lookahead refuses zero, which Slurm takes for no limit
        r"(?=.*[1-9])(\d+-)?\d{1,2}:[0-5]\d:[0-5]\d",
        "HH:MM:SS or D-HH:MM:SS, above zero, in quotes in a YAML file",
    ),
]
"""A time limit in Slurm's format."""
RESERVED_VARIABLES = (
    r"STAGE_(DEADLINE|NEEDS_GPU)|PYTHONSAFEPATH|NVIDIA_TF32_OVERRIDE"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|TORCHELASTIC_(RESTART_COUNT|MAX_RESTARTS|RUN_ID|USE_AGENT_STORE|ERROR_FILE)"
    r"|SLURM_(JOB_\w+|\w+ID|NTASKS)"
)
"""Matches environment variables that the launcher, stages, torchrun or Slurm set. A user's value
would be overwritten, or would stop the stage from finding its ranks."""
VariableName = Annotated[
    str,
    matching(
        rf"(?!({RESERVED_VARIABLES})$)[A-Za-z_]\w*",
        "the name of an environment variable that neither the launcher nor torchrun nor Slurm sets",
    ),
]
Environment = dict[VariableName, str]

MESSAGES = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "finite_number": "must be finite",
    "too_short": "must not be empty",
    "list_type": "must be a list, such as [a,b]",
    "string_type": "must be a string",
    "dict_type": "must be a mapping, such as {{a: 1}}",
}
"""Error message for each of pydantic's error types. Braces contain keys of the error's ``ctx``."""


@cache
def type_adapter(dataclass_type: type[DataclassInstance]) -> TypeAdapter[Any]:
    """Returns pydantic's validator of a dataclass. Caches it, because building it is slow."""
    return TypeAdapter(dataclass_type)


def violations(settings: DataclassInstance, where: str = "") -> Iterator[str]:
    """Yields an error message for each invalid setting.

    ``where`` is the path of the settings in the config, such as ``stages.distill``.
    """
    try:
        type_adapter(type(settings)).validate_python(asdict(settings))
    except ValidationError as error:
        yield from (_message(details, where) for details in error.errors())


def computed_settings(settings: DataclassInstance, where: str) -> Iterator[str]:
    """Yields an error message for each ``COMPUTED`` setting that the user has set.

    ``where`` is the path of the settings in the config, such as ``stages.distill``.
    """
    for item in fields(settings):
        value, path = getattr(settings, item.name), f"{where}.{item.name}"
        if item.metadata.get("computed"):
            if value is not None:
                yield f"invalid {path}={value}: is set automatically, so leave it out"
        elif is_dataclass(value) and not isinstance(value, type):  # nested settings
            yield from computed_settings(value, path)


def _message(details: ErrorDetails, where: str) -> str:
    """Returns an error message such as "invalid stages.distill.lr=-1: must be greater than 0"."""
    path = where
    for key in details["loc"]:  # field names and list indices
        if key != "[key]":  # pydantic adds this if the key of a mapping is invalid
            path += f"[{key}]" if isinstance(key, int) else f".{key}"
    context = details.get("ctx", {})
    values = {k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()}
    template = MESSAGES.get(details["type"])
    must = template.format(**values) if template else details["msg"]
    return f"invalid {path.strip('.')}={details['input']}: {must}"
