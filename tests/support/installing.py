"""Skips tests that need a package index, or programs that are not installed here."""

from __future__ import annotations

import os
import shutil
from subprocess import CompletedProcess

import pytest


def require_package_index(installation: CompletedProcess[str]) -> None:
    """Skips the test if pip or uv, which has ended, could not reach a package index."""
    errors = installation.stderr
    if "(from versions: none)" in errors or "Failed to fetch" in errors:  # of pip, of uv
        pytest.skip("no package index can be reached")


def require_programs(server: str, *programs: str) -> None:
    """Skips the test if this machine lacks a server's programs, or if the user is not root.

    Args:
        server: ``Docker`` or ``Slurm``. ``tests/install_<server>.sh`` installs its programs.
        programs: Programs that the test needs on the ``PATH``.
    """
    if missing := [program for program in programs if not shutil.which(program)]:
        script = f"tests/install_{server.lower()}.sh"
        pytest.skip(f"no {server} here: {', '.join(missing)} missing ({script})")
    if os.geteuid() != 0:
        pytest.skip(f"starting a {server} needs root")
