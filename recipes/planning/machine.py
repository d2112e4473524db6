"""What this machine computes and moves in a second, measured once and kept in the user's cache."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from recipes.core.files import write_json
from recipes.core.fingerprint import digest
from recipes.core.versions import installed
from recipes.core.wheels import cache_dir
from recipes.planning.hardware import cpuinfo

FOLDER = "machines"
FORMAT = 3
"""Of what is measured, and how."""
PASSING = ("processor", "cpu MHz", "core id", "apicid", "initial apicid", "bogomips", "BogoMIPS")
"""What differs between the cores of a processor, or from one look to the next."""


@dataclass(frozen=True)
class Rates:
    """What all threads together reach, by themselves: rates of ``Hardware``, by its names."""

    flops_per_second: float
    float32_flops_per_second: float
    bytes_per_second: float

    def __post_init__(self) -> None:
        if not all(isinstance(rate, float) and 0 < rate < math.inf for rate in vars(self).values()):
            raise ValueError(f"{self} are no rates")


def processor() -> str:
    """What tells this machine's processor from others: its name, steps, caches and flags."""
    lines = {line for line in cpuinfo().splitlines() if not line.startswith(PASSING)}
    return "\n".join(sorted(lines))


def kept(threads: int) -> Rates | None:
    """What was measured before of this processor with so many threads; none if it is unreadable."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Rates(**json.loads(_file(threads).read_text(encoding="utf-8")))
    return None


def keep(threads: int, rates: Rates) -> None:
    """Keeps what was measured, where there is a place for it."""
    file = _file(threads)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(rates))


def _file(threads: int) -> Path:
    known = {"processor": processor(), "cores": os.cpu_count(), "threads": threads}
    known |= {"torch": installed("torch"), "format": FORMAT}
    return cache_dir() / FOLDER / f"{digest(known)[:32]}.json"
