"""Mounts small disks in memory, and makes all other disks look large."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

SMALL_DISK = 1 << 30
"""Largest size of a disk of ``small_disk``, in bytes."""
FREE_BYTES = 10**15
"""Free bytes that ``large_disks`` reports for every other disk."""


def large_disks() -> mock._patch[Callable[[Path], object]]:
    """Patches ``shutil.disk_usage``, so that plans of any size fit, except on a ``small_disk``.

    A test may plan a recipe that needs more space than this machine has.
    """
    real_disk_usage = shutil.disk_usage

    def disk_usage(path: Path) -> object:
        usage = real_disk_usage(path)
        return usage if usage.total <= SMALL_DISK else usage._replace(free=FREE_BYTES)

    return mock.patch.object(shutil, "disk_usage", disk_usage)


@dataclass(frozen=True)
class Disk:
    """A mounted file system in memory."""

    folder: Path

    def remount(self, options: str) -> None:
        """Changes the size (``size=2m``), or whether the disk is read-only (``ro``, ``rw``)."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)

    def leave_free(self, bytes_free: int) -> None:
        """Resizes the disk so that this number of bytes is free."""
        stats = os.statvfs(self.folder)
        used = (stats.f_blocks - stats.f_bfree) * stats.f_frsize
        self.remount(f"size={used + bytes_free}")


@contextmanager
def small_disk(folder: Path, size: str = "2m") -> Iterator[Disk]:
    """Mounts a small disk; skips the test if this process may not mount one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
