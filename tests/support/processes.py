"""What runs on this machine, from ``/proc``; what ends while it is looked at is passed over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def _read(pid: int, name: str) -> bytes:
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""


def every() -> Iterator[int]:
    """Ids of all processes."""
    return map(int, filter(str.isdigit, os.listdir("/proc")))


def parent(pid: int) -> int | None:
    """The process that started it."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else None


def children() -> dict[int, list[int]]:
    """Every process's children."""
    found: dict[int, list[int]] = {}
    for pid in every():
        if (of := parent(pid)) is not None:
            found.setdefault(of, []).append(pid)
    return found


def command(pid: int) -> str:
    """Its command line."""
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")


def with_variable(name: str, value: str) -> list[int]:
    """Processes that were started with a variable of that value."""
    wanted = f"{name}={value}".encode()
    return [pid for pid in every() if wanted in _read(pid, "environ").split(b"\0")]


def working_in(directory: Path) -> list[int]:
    """Processes whose working directory it is."""
    return [pid for pid in every() if _works_in(pid, directory)]


def _works_in(pid: int, directory: Path) -> bool:
    try:
        return Path("/proc", str(pid), "cwd").readlink() == directory
    except OSError:
        return False
