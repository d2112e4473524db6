"""The lock of a run directory: only one launcher at a time may write to the directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from recipes.core.errors import RecipeError

LOCK = ".lock"
NO_LOCKS = frozenset((errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK))
"""Error numbers of ``flock`` on a file system that has no locks."""
WAIT_SECONDS = 0.5
"""How long ``acquire`` tries to get the lock. ``read_holder`` also takes the lock for a moment, so
one failed try does not mean that another launcher runs."""
SetStage = Callable[[str | None], None]
"""Writes the running stage, or ``None``, to the lock file, which the command ``status`` reads."""


@dataclass(frozen=True)
class Holder:
    """The launcher that holds the lock, and the stage that it runs."""

    host: str
    """Name of the launcher's machine."""
    pid: int
    """Process id of the launcher."""
    stage: str | None
    """The running stage; ``None`` while no stage runs."""


@contextmanager
def acquire(run_dir: Path) -> Iterator[SetStage]:
    """Locks a run directory; yields the function that records the running stage.

    If this process is killed, the kernel releases the lock.

    Raises:
        RecipeError: Another process holds the lock, or the file system has no locks.
    """
    with (run_dir / LOCK).open("a", encoding="utf-8") as file:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                _flock(file, fcntl.LOCK_EX)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RecipeError(
                        f"another process is running {run_dir}.",
                        "wait for it, or choose another run_dir",
                    ) from None
                time.sleep(0.02)

        def set_stage(stage: str | None) -> None:
            file.seek(0)
            file.truncate()
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "stage": stage}, file)
            file.flush()

        set_stage(None)
        yield set_stage


def read_holder(run_dir: Path) -> Holder | None:
    """Returns the holder of the lock; ``None`` if the lock is free."""
    with suppress(FileNotFoundError), (run_dir / LOCK).open(encoding="utf-8") as file:
        try:
            # With exclusive locks, two processes in this function would mistake each other for a
            # launcher. Shared locks do not exclude each other.
            _flock(file, fcntl.LOCK_SH)
        except BlockingIOError:
            text = file.read()
            # The file is empty for a moment while the launcher rewrites it: the holder is unknown.
            return Holder(**json.loads(text)) if text else Holder("?", 0, None)
    return None


def _flock(file: IO[str], operation: int) -> None:
    """Locks a file with ``LOCK_EX`` or ``LOCK_SH``, without waiting.

    Raises:
        BlockingIOError: Another process holds a conflicting lock.
        RecipeError: The file system has no locks.
    """
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise RecipeError(
            f"{file.name} cannot be locked: {error.strerror}.",
            "mount its file system with locks (Lustre: mount option flock; localflock "
            "only if a single node starts runs), or set run_dir to another file system",
        ) from error
