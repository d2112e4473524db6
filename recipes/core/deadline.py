"""Stopping by the clock: a stage that must end before it is done saves its work and says so.

Who starts a stage sets ``STAGE_DEADLINE``, in seconds since 1970, as the Slurm executor does. It is
a resource: it decides when the work is done, never what comes out of it.
"""

from __future__ import annotations

import os
import time

from recipes.core.errors import RecipeError

DEADLINE = "STAGE_DEADLINE"


class StoppedByClockError(RecipeError):
    """A stage saved its work and ends unfinished. All ranks raise it, at the same step."""


def deadline() -> float | None:
    """When this stage must stop, in seconds since 1970, or ``None``; refuses anything else."""
    text = os.environ.get(DEADLINE)
    if not text:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise RecipeError(
            f"{DEADLINE}={text} is not a time.", "set it to seconds since 1970, or unset it"
        ) from error


def time_is_up() -> bool:
    """Whether the deadline has passed on this machine's clock."""
    limit = deadline()
    return limit is not None and time.time() >= limit
