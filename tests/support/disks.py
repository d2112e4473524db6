"""Disks as tests need them: small ones of their own, and plans that do not depend on this one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SMALL = 1 << 30
"""Bytes; a disk of no more is one that was made to be filled."""
ROOM = 10**15


def pretend_room() -> None:
    """From now on this process finds room on every disk that is not small, for plans of any size.

    Most tests plan recipes that would need 13 GB, and run none.
    """
    measured = shutil.disk_usage

    def roomy(path: Path) -> object:
        found = measured(path)
        return found if found.total <= SMALL else found._replace(free=ROOM)

    setattr(shutil, "disk_usage", roomy)


@dataclass(frozen=True)
class Disk:
    """A mounted file system in memory."""

    folder: Path

    def remount(self, options: str) -> None:
        """Changes its size (``size=2m``), or whether it can be written (``ro``, ``rw``)."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)

    def leave(self, bytes_free: int) -> None:
        """Takes away all but so much of what is free."""
        found = os.statvfs(self.folder)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        self.remount(f"size={used + bytes_free}")


@contextmanager
def small_disk(folder: Path, size: str = "2m") -> Iterator[Disk]:
    """Mounts one; skips the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
