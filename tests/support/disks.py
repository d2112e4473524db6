"""Mounts small file systems (disks) in memory, and makes all other disks look large."""

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

SMALL_DISK_BYTES = 1 << 30
"""``large_disks`` takes every disk of at most this size for one of ``small_disk``."""
FREE_BYTES = 10**15
"""Free bytes that ``large_disks`` reports for every other disk: 1 PB, enough for any plan."""


def large_disks() -> mock._patch[Callable[[Path], object]]:
    """Returns a patch of ``shutil.disk_usage`` that reports ``FREE_BYTES`` on all large disks.

    With this patch, a test can plan a recipe that needs more space than this machine has.
    """
    real_disk_usage = shutil.disk_usage

    def disk_usage(path: Path) -> object:
        usage = real_disk_usage(path)
        return usage if usage.total <= SMALL_DISK_BYTES else usage._replace(free=FREE_BYTES)

    return mock.patch.object(shutil, "disk_usage", disk_usage)


@dataclass(frozen=True)
class Disk:
    """A mounted file system in memory."""

    folder: Path

    def remount(self, options: str) -> None:
        """Remounts the disk with another size (``size=2m``), read-only (``ro``) or not (``rw``)."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)

    def leave_free(self, bytes_free: int) -> None:
        """Resizes the disk so that ``bytes_free`` bytes are free."""
        stats = os.statvfs(self.folder)
        used = (stats.f_blocks - stats.f_bfree) * stats.f_frsize
        self.remount(f"size={used + bytes_free}")


@contextmanager
def small_disk(folder: Path, size: str = "2m") -> Iterator[Disk]:
    """Mounts a small disk at ``folder``; skips the test if this process may not mount it.

    Args:
        folder: The mount point, which is created.
        size: Size in the syntax of tmpfs, at most ``SMALL_DISK_BYTES``.
    """
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
