"""Runs the launcher in another process: a new one as for a user, or a fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from recipes.core.files import REPO_ROOT
from tests.support.forked import run_forked

LAUNCHER = str(REPO_ROOT / "launch" / "run.py")


@dataclass(frozen=True)
class CommandResult:
    """Exit status and output of a command."""

    code: int
    output: str
    """Standard output and standard error."""


def run_recipe(*overrides: str, cwd: Path, timeout: float = 600) -> CommandResult:
    """Runs the launcher as a user does, for at most ``timeout`` seconds."""
    process = subprocess.run(
        [sys.executable, LAUNCHER, *overrides],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "COLUMNS": "160"},
        check=False,
    )
    return CommandResult(process.returncode, process.stdout + process.stderr)


def run_on_login_node(python: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the launcher with ``python``, the interpreter of the fixture ``launcher_python``."""
    # ``PYTHONPATH`` could add the packages of this process's interpreter.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, LAUNCHER, *arguments],
        cwd=cwd,
        env={**env, "COLUMNS": "160", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def fork_launcher(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the launcher in a fork of a process that has imported it, which is faster.

    Disks look large (``large_disks``). ``env`` adds environment variables.
    """
    environment = {**os.environ, "COLUMNS": "200", **env}
    imports = ["tests.support.launcher_imports"]
    return run_forked(imports, [LAUNCHER, *arguments], environment, cwd)


def write_program(file: Path, commands: str) -> Path:
    """Writes an executable shell script, and makes its folder; returns the script's path."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{commands}\n")
    file.chmod(0o755)
    return file


def run_and_kill(
    *overrides: str,
    cwd: Path,
    metrics: Path,
    records: int,
    ready: Callable[[], object] = lambda: True,
) -> str:
    """Starts the launcher, kills it with SIGKILL while a stage runs, and waits for its processes.

    Args:
        overrides: Overrides of the recipe.
        cwd: Working directory. No other process may have it.
        metrics: The stage's metrics file, which has one record per line.
        records: Number of records in that file to wait for before the kill.
        ready: Another condition to wait for before the kill.

    Returns:
        The launcher's standard output.
    """
    file = cwd / "output.txt"
    with file.open("w") as output:
        launcher = subprocess.Popen([sys.executable, LAUNCHER, *overrides], cwd=cwd, stdout=output)
    deadline = time.monotonic() + 600
    while not metrics.exists() or metrics.read_text().count("\n") < records or not ready():
        assert launcher.poll() is None, f"ended before {records} records: {file.read_text()}"
        assert time.monotonic() < deadline, f"no {records} records after 600 s"
        time.sleep(0.02)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_until_unused(cwd)
    return file.read_text()


def wait_until_unused(directory: Path) -> None:
    """Waits until no process has this working directory; fails the test after 120 s.

    A killed launcher's processes have its working directory, and must end soon after it.
    """

    def processes() -> list[psutil.Process]:
        every_process = psutil.process_iter(["cwd"])
        return [process for process in every_process if process.info["cwd"] == str(directory)]

    deadline = time.monotonic() + 120
    while running := processes():
        if time.monotonic() > deadline:
            pytest.fail(f"still running: {running}")
        time.sleep(0.1)
