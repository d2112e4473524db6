"""Detects hangs: a process dumps its stacks and exits when it reports no progress in time.

The timeout of PyTorch's collectives is not enough. It ends the ranks that wait for a hanging rank,
but does not show what the hanging rank does. A stage with one rank has no collectives.
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
"""File in ``work/`` for the stacks of the rank with the number ``{}``; empty until it hangs."""
_active_timeouts: list[tuple[float, IO[str]]] = []
"""Seconds and stack file of each active ``watch_for_hangs``. Only the last (innermost) applies."""
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
"""Matches a stack frame in the format of ``faulthandler``."""


@contextmanager
def watch_for_hangs(seconds: float | None, work: Path, rank: int) -> Iterator[None]:
    """Ends this process after ``seconds`` without a call of ``report_progress``.

    First writes all stacks to the file ``STACKS`` in ``work``. ``None`` disables the watchdog. The
    timer of ``faulthandler`` runs in C, so it also detects a hang in code that holds the GIL.
    """
    if seconds is None:
        yield
        return
    with (work / STACKS.format(rank)).open("w") as file:
        _active_timeouts.append((seconds, file))
        try:
            report_progress()
            yield
        finally:
            _active_timeouts.pop()
            faulthandler.cancel_dump_traceback_later()


def report_progress() -> None:
    """Restarts the timeout of ``watch_for_hangs``. Does nothing if no timeout is active."""
    if _active_timeouts:
        seconds, file = _active_timeouts[-1]
        # Replaces the timer of the last call.
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)


@contextmanager
def pause_watchdog() -> Iterator[None]:
    """Pauses the timeout in a block that waits for processes with their own watchdog."""
    faulthandler.cancel_dump_traceback_later()
    try:
        yield
    finally:
        report_progress()


def hang_error(work: Path) -> RecipeError | None:
    """Returns an error that says where each rank hung; ``None`` if no rank hung."""
    positions = ""
    for file in sorted(work.glob(STACKS.format("*"))):
        stacks = file.read_text(encoding="utf-8", errors="replace")
        if position := _main_thread_position(stacks):
            rank = file.stem.rpartition("-")[2]
            positions += f"\n  rank {rank}: {position}"
    if not positions:
        return None
    return RecipeError(
        f"it made no progress for resources.hang_timeout seconds; it was at{positions}",
        f"read {work}/{STACKS.format('*')}; the same command resumes. If the stage was only slow, "
        "set a higher hang_timeout",
    )


def _main_thread_position(stacks: str) -> str | None:
    """Returns where the main thread was; ``None`` if the stacks are empty.

    ``faulthandler`` writes the main thread last, and the innermost frame of each thread first.
    """
    main_thread = stacks.rfind("Thread 0x")
    frame = _FRAME.search(stacks, main_thread) if main_thread >= 0 else None
    return f"{frame[1]}, line {frame[2]}, in {frame[3]}" if frame else None
