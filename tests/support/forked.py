"""Runs Python programs in forks of one process that has imported their modules.

Each program has its own arguments, environment, directory, output and exit status. But a fork does
not spend seconds on imports.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing import connection
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from recipes.core.files import REPO_ROOT
from recipes.core.fork_server import fork_module, fork_server, watch_child
from recipes.core.processes import die_with_parent

TIMEOUT_SECONDS = 600
"""Maximum run time of a command of ``run_forked``."""


@cache
def _server(variables: tuple[tuple[str, str], ...], *modules: str) -> tuple[socket.socket, Path]:
    """Starts a fork server, once for the same arguments; returns the server's socket and log."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "fork_server.log"
    defaults = {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **defaults, **dict(variables)}
    return stack.enter_context(fork_server(modules, environment, log)), log


@contextmanager
def forked(
    imports: Sequence[str],
    command: Sequence[str],
    environment: Mapping[str, str],
    output: IO[bytes],
    *,
    cwd: Path | None = None,
    errors: Path | None = None,
    status: Path | None = None,
    ranks: int = 0,
    server_variables: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Callable[[], bool]]:
    """Runs ``python COMMAND`` in a fork; yields a function that returns whether the fork has ended.

    Args:
        imports: Modules that the fork server imports.
        command: A file and its arguments, or ``-m``, a module and its arguments.
        environment: All environment variables of the program.
        output: File for standard output; also for standard error, if ``errors`` is ``None``.
        cwd: Working directory; by default that of this process.
        errors: File for standard error.
        status: File to which the exit status is written, in decimal.
        ranks: Number of processes with ``RANK`` and ``LOCAL_RANK``; 0 means one without them.
        server_variables: Environment variables of the fork server, which libraries read when they
            are imported. ``PYTHONPATH`` also sets ``sys.path`` of the program.
    """
    server, log = _server(tuple(server_variables.items()), *imports)
    request = {
        "command": command,
        "environment": dict(environment),
        "cwd": str(cwd or Path.cwd()),
        "errors": errors and str(errors),
        "status": status and str(status),
        "ranks": ranks,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request, file)
        file.flush()
        pidfd = fork_module(server, __name__, [file.name], output)
        assert pidfd is not None, log.read_text()
        with watch_child(server, pidfd, output) as has_ended:
            yield has_ended


def run_forked(
    imports: Sequence[str],
    command: Sequence[str],
    environment: Mapping[str, str],
    cwd: Path,
    server_variables: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """Runs ``python COMMAND`` in a fork, and waits as ``subprocess.run`` does; captures its output.

    ``forked`` describes the arguments.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, errors, status = (Path(folder) / name for name in ("output", "errors", "status"))
        options: dict[str, Any] = {"server_variables": server_variables}
        options |= {"errors": errors, "status": status}
        deadline = time.monotonic() + TIMEOUT_SECONDS
        with (
            out.open("wb") as output,
            forked(imports, command, environment, output, cwd=cwd, **options) as has_ended,
        ):
            while not has_ended():
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(command, TIMEOUT_SECONDS)
                time.sleep(0.005)
        code = int(status.read_text())
        return subprocess.CompletedProcess(command, code, out.read_text(), errors.read_text())


def main() -> None:
    """Runs in a fork: reads the request file that ``forked`` wrote, and runs its command."""
    request = json.loads(Path(sys.argv[1]).read_text())
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    # The fork server sets this entry to None, which forbids the import. A launcher imports it.
    sys.modules.pop("wandb", None)
    if request["errors"]:
        with Path(request["errors"]).open("wb") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())
    ranks, command = request["ranks"], request["command"]
    code = _run_ranks(command, ranks) if ranks else _run(command)
    if request["status"]:
        Path(request["status"]).write_text(str(code))


def _run(command: list[str]) -> int:
    """Runs a command in this process and returns its exit status."""
    is_module = command[0] == "-m"
    sys.argv = command[1:] if is_module else command
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):  # an error message: Python prints it and exits with 1
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run_ranks(command: list[str], num_ranks: int) -> int:
    """Runs a command on each rank; when one rank fails, terminates the other ranks.

    Returns:
        0 if all ranks succeed; otherwise the largest exit status or signal number of a rank.
    """
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_run_rank, args=(command, n)) for n in range(num_ranks)]
    for rank in ranks:
        rank.start()
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        for sentinel in connection.wait(list(running)):
            rank = running.pop(sentinel)  # type: ignore[index]
            rank.join()
            if rank.exitcode:
                for other in running.values():
                    other.terminate()
    return max(abs(rank.exitcode or 0) for rank in ranks)  # -N means killed by signal N


def _run_rank(command: list[str], rank: int) -> None:
    """Runs a command in this process as one rank, and exits with the command's status."""
    die_with_parent()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.exit(_run(command))


if __name__ == "__main__":
    main()
