"""The launcher as a user starts it, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes.core.files import REPO_ROOT


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    output: str


def run_recipe(*overrides: str, cwd: Path, timeout: float = 600) -> Result:
    """Runs the launcher as a user would, in a directory of its own."""
    done = subprocess.run(
        [sys.executable, str(REPO_ROOT / "launch" / "run.py"), *overrides],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "COLUMNS": "160"},
        check=False,
    )
    return Result(done.returncode, done.stdout + done.stderr)


def run_and_kill(
    *overrides: str,
    cwd: Path,
    metrics: Path,
    records: int,
    ready: Callable[[], object] = lambda: True,
) -> None:
    """Starts the launcher and kills it, once a stage has written so many records and is ready."""
    command = [sys.executable, str(REPO_ROOT / "launch" / "run.py"), *overrides]
    launcher = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count("\n") < records or not ready():
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_until_none_works_in(cwd)


def wait_until_none_works_in(directory: Path) -> None:
    """A stage's processes, also those that its libraries start, must die with the launcher."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        processes = filter(str.isdigit, os.listdir("/proc"))
        found = [pid for pid in processes if _works_in(pid, directory)]
        if not found:
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {found}")


def _works_in(pid: str, directory: Path) -> bool:
    try:
        return Path("/proc", pid, "cwd").readlink() == directory
    except OSError:
        return False
