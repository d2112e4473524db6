"""Rehearsals accept and refuse the same operations on mixed devices as CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from recipes.core.files import REPO_ROOT
from tests.cpu.rehearsal.operations import ALLOWED, REFUSED


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    """Returns the errors by operation, as ``operations.main`` prints them.

    Another process runs the operations, because fake CUDA cannot be uninstalled.
    """
    command = [sys.executable, "-m", "tests.cpu.rehearsal.operations"]
    env = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(process.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", REFUSED)
def test_operations_that_cuda_refuses_are_refused(name: str, errors: dict[str, str]) -> None:
    assert "device" in errors[f"refused {name}"]


@pytest.mark.parametrize("name", ALLOWED)
def test_operations_that_cuda_accepts_are_accepted(name: str, errors: dict[str, str]) -> None:
    assert f"allowed {name}" not in errors
