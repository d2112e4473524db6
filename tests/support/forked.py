"""Programs in processes forked from one that has imported, once, what they need.

Each has its own arguments, environment, directory, output and exit status, as if it were started;
only the seconds of its imports are not spent again.
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
from typing import IO

from recipes.core.files import REPO_ROOT
from recipes.core.fork_server import fork_module, fork_server, watch_child
from recipes.core.processes import die_with_parent

PATIENCE = 600
"""Seconds that a command may take, on a machine that has much else to do."""


@cache
def _server(*modules: str) -> tuple[socket.socket, Path]:
    """What is forked, one for each process of tests; it ends with it."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "fork_server.log"
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
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
) -> Iterator[Callable[[], bool]]:
    """Runs what would follow ``python`` on a command line; yields what tells whether it has ended.

    Args:
        imports: Modules that are imported before.
        command: A file and its arguments, or ``-m``, a module and its arguments.
        environment: All variables.
        output: Gets standard output, and errors where no file is named for them.
        cwd: Directory; by default this process's.
        errors: File for standard error.
        status: File for the exit status.
        ranks: Processes, each told its rank as torchrun would; 0 starts the command alone.
    """
    server, log = _server(*imports)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as request:
        told = {
            "command": list(command),
            "environment": dict(environment),
            "cwd": str(cwd or Path.cwd()),
            "errors": errors and str(errors),
            "status": status and str(status),
            "ranks": ranks,
        }
        json.dump(told, request)
        request.flush()
        process = fork_module(server, __name__, [request.name], output)
        assert process is not None, log.read_text()
        with watch_child(server, process, output) as ended:
            yield ended


def run_forked(
    imports: Sequence[str], command: Sequence[str], environment: Mapping[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` with captured output."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("output", "errors", "status")]
        out, errors, status = files
        with (
            out.open("wb") as output,
            forked(
                imports, command, environment, output, cwd=cwd, errors=errors, status=status
            ) as ended,
        ):
            deadline = time.monotonic() + PATIENCE
            while not ended():
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(list(command), PATIENCE)
                time.sleep(0.005)
        code, *texts = (int(status.read_text()), out.read_text(), errors.read_text())
    return subprocess.CompletedProcess(list(command), code, *texts)


def main() -> None:
    """Runs the command of a request in this child."""
    told = json.loads(Path(sys.argv[1]).read_text())
    os.environ.clear()
    os.environ.update(told["environment"])
    os.chdir(told["cwd"])
    sys.modules.pop("wandb", None)  # which stages go without, and a launcher may need
    if told["errors"]:
        file = os.open(told["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, sys.stderr.fileno())
        os.close(file)
    run = _run_ranks if told["ranks"] else _run
    code = run(told["command"], told["ranks"])
    if told["status"]:
        Path(told["status"]).write_text(str(code))


def _run(command: list[str], _: int = 0) -> int:
    """Runs the command in this process; returns what would be its exit status."""
    is_module = command[0] == "-m"
    sys.argv = command[is_module:]
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 1 if isinstance(end.code, str) else end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run_ranks(command: list[str], number: int) -> int:
    """Runs the command in as many processes; when one fails, the others are ended."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_be_rank, args=(command, n)) for n in range(number)]
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
    return max(abs(rank.exitcode or 0) for rank in ranks)


def _be_rank(command: list[str], rank: int) -> None:
    die_with_parent()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.exit(_run(command))


if __name__ == "__main__":
    main()
