"""Skips tests that need a package index, or programs that are not installed here."""

from __future__ import annotations

import os
import shutil
from subprocess import CompletedProcess

import pytest


def require_package_index(done: CompletedProcess[str]) -> None:
    """Skips the test if pip or uv found no package index."""
    if "(from versions: none)" in done.stderr or "Failed to fetch" in done.stderr:
        pytest.skip("no package index can be reached")


def require_programs(server: str, *programs: str) -> None:
    """Skips tests that start a server, Docker or Slurm, if they cannot start its programs here."""
    if missing := [program for program in programs if not shutil.which(program)]:
        script = f"tests/install_{server.lower()}.sh"
        pytest.skip(f"no {server} here: {', '.join(missing)} missing ({script})")
    if os.geteuid() != 0:
        pytest.skip(f"starting a {server} needs root")
