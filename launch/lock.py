"""The lock of a run directory, and who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from recipes.core.errors import RecipeError

LOCK = ".lock"
LOOK_SECONDS = 0.5
"""In which ``holder`` has long looked: it holds the lock for a moment, and is no launcher."""


@dataclass(frozen=True)
class Holder:
    """A launcher that works on a run, and the stage it is at."""

    host: str
    pid: int
    stage: str | None


class Holding:
    """A lock that this process holds."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def works_on(self, stage: str | None) -> None:
        """Says which stage runs, for ``status``."""
        self._file.seek(0)
        self._file.truncate()
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "stage": stage}, self._file)
        self._file.flush()


@contextmanager
def held(run_dir: Path) -> Iterator[Holding]:
    """Refuses a run that another launcher writes; the kernel frees it however that one dies."""
    with (run_dir / LOCK).open("a", encoding="utf-8") as file:
        deadline = time.monotonic() + LOOK_SECONDS
        while not _taken(file):
            if time.monotonic() > deadline:
                raise RecipeError(
                    f"another process is running {run_dir}.",
                    "wait for it, or choose another run_dir",
                )
            time.sleep(0.02)
        holding = Holding(file)
        holding.works_on(None)
        yield holding


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(run_dir: Path) -> Holder | None:
    """The process that holds the lock; ``None`` when nobody does."""
    try:
        with (run_dir / LOCK).open(encoding="utf-8") as file:
            try:
                # Shared: two that look at the same time do not see each other.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read()
                return Holder(**json.loads(text)) if text else Holder("?", 0, None)
    except FileNotFoundError:
        pass
    return None
