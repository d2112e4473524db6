"""A limit of silence: a process that records no progress for too long says what it does, and ends.

Ranks that wait for one that hangs are ended by the timeout of their collectives, which cannot say
what that one does, and a stage of one rank by nothing. Each process watches itself, so that it is
the same on this machine, in a container and on Slurm, with no debugger to install.
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
"""In ``work/``: what each thread of a rank was doing when its time was up."""
_watched: list[tuple[float, IO[str]]] = []
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


@contextmanager
def limited(seconds: float | None, work: Path, rank: int) -> Iterator[None]:
    """Ends this process, by C code that needs no lock, when it has been silent for so long.

    Args:
        seconds: The limit; ``None`` for none.
        work: Where to leave what each thread was doing.
        rank: Of this process.
    """
    if seconds is None:
        yield
        return
    with (work / STACKS.format(rank)).open("w") as file:
        _watched.append((seconds, file))
        try:
            progressed()
            yield
        finally:
            _watched.pop()
            faulthandler.cancel_dump_traceback_later()


def progressed() -> None:
    """Starts the time anew."""
    if _watched:
        seconds, file = _watched[-1]
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)


@contextmanager
def others_work() -> Iterator[None]:
    """A time in which this process waits for others, which have limits of their own."""
    faulthandler.cancel_dump_traceback_later()
    try:
        yield
    finally:
        progressed()


def hung(work: Path) -> RecipeError | None:
    """Which ranks were silent for too long and what each was doing; ``None`` if none was."""
    ranks = {}
    for file in sorted(work.glob(STACKS.format("*"))):
        if frame := _innermost(file.read_text(encoding="utf-8", errors="replace")):
            ranks[file.stem.rpartition("-")[2]] = frame
    if not ranks:
        return None
    doing = "".join(f"\n  rank {rank}: {frame}" for rank, frame in ranks.items())
    return RecipeError(
        f"it made no progress for as long as resources.max_silence allows; then it was at{doing}",
        f"read {work}/{STACKS.format('*')}; the same command resumes, or set max_silence higher",
    )


def _innermost(stacks: str) -> str | None:
    """Where the main thread was, which comes last."""
    found = _FRAME.search(stacks, stacks.rfind("Thread 0x")) if "Thread 0x" in stacks else None
    return f"{found[1]}, line {found[2]}, in {found[3]}" if found else None
