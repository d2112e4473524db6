"""Skips tests that install packages where no package index can be reached."""

from __future__ import annotations

from subprocess import CompletedProcess

import pytest


def require_package_index(done: CompletedProcess[str]) -> None:
    """Skips the test if pip or uv found no package index."""
    if "(from versions: none)" in done.stderr or "Failed to fetch" in done.stderr:
        pytest.skip("no package index can be reached")
