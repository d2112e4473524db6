"""Detects hangs: dumps all stacks and exits when no progress is reported in time.

The timeout of collectives is not enough: it ends the ranks that wait for a hanging rank, but does
not show what the hanging rank does, and a stage with one rank has no collectives. Each process
watches itself, so that the watchdog works locally, in a container and on Slurm.
"""

from __future__ import annotations

import faulthandler
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from recipes.core.errors import RecipeError

STACKS = "hung-rank-{}.txt"
"""File in ``work/`` with the stacks of a rank that hung."""
_watched: list[tuple[float, IO[str]]] = []
"""Timeout and file of each active ``watch_for_hangs``. The last one, the innermost, applies."""
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


@contextmanager
def watch_for_hangs(seconds: float | None, work: Path, rank: int) -> Iterator[None]:
    """Ends this process when ``report_progress`` is not called in time.

    ``faulthandler`` checks this in C, so it also detects a hang in code that holds the GIL.

    Args:
        seconds: The timeout; ``None`` disables the watchdog.
        work: Directory for the file with the stacks.
        rank: Rank of this process.
    """
    if seconds is None:
        yield
        return
    with (work / STACKS.format(rank)).open("w") as file:
        _watched.append((seconds, file))
        try:
            report_progress()
            yield
        finally:
            _watched.pop()
            faulthandler.cancel_dump_traceback_later()


def report_progress() -> None:
    """Restarts the timeout of ``watch_for_hangs``. Does nothing if no timeout is active."""
    if _watched:
        seconds, file = _watched[-1]
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)


@contextmanager
def pause_watchdog() -> Iterator[None]:
    """Pauses the timeout while this process waits for processes that have their own watchdog."""
    faulthandler.cancel_dump_traceback_later()
    try:
        yield
    finally:
        report_progress()


def hang_error(work: Path) -> RecipeError | None:
    """Returns an error with the position of each rank that hung; ``None`` if no rank hung."""
    positions = ""
    for file in sorted(work.glob(STACKS.format("*"))):
        if position := _main_thread_position(file.read_text(encoding="utf-8", errors="replace")):
            positions += f"\n  rank {file.stem.rpartition('-')[2]}: {position}"
    if not positions:
        return None
    return RecipeError(
        f"it made no progress for resources.hang_timeout seconds; it was at{positions}",
        f"read {work}/{STACKS.format('*')}; the same command resumes. If the stage was only slow, "
        "set a higher hang_timeout",
    )


def _main_thread_position(stacks: str) -> str | None:
    """Returns the innermost frame of the main thread, which is the last thread in a dump."""
    start = stacks.rfind("Thread 0x")
    frame = _FRAME.search(stacks, start) if start >= 0 else None
    return f"{frame[1]}, line {frame[2]}, in {frame[3]}" if frame else None
