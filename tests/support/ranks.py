"""Runs several ranks as torchrun does, but in forks of a process that has imported NeMo.

torchrun itself starts ranks in ``tests/cpu/core``, ``tests/slurm``, and tests that kill ranks.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from launch.executors import local
from launch.executors.local import PRELOADED, LocalConfig
from launch.planned import PlannedStage
from recipes.core.files import REPO_ROOT
from tests.support.forked import forked


@contextmanager
def stage_ranks(stage: PlannedStage, log: IO[bytes]) -> Iterator[Callable[[], bool]]:
    """Starts the ranks of a stage; yields a function that tells whether they have ended."""
    environment = {**os.environ, **local.environment(stage, LocalConfig())}
    with fork_command(local.command(stage, sys.executable), environment, log) as has_ended:
        yield has_ended


@contextmanager
def fork_command(
    command: list[str], environment: Mapping[str, str], log: IO[Any]
) -> Iterator[Callable[[], bool]]:
    """Runs a command in one fork, or if it starts torchrun, in one fork for each rank."""
    module = len(command) - command[::-1].index("-m") - 1  # index of the last -m
    nproc = [word.partition("=")[2] for word in command if word.startswith("--nproc-per-node=")]
    start = partial(_ranks, int(nproc[0])) if nproc else partial(forked, PRELOADED)
    with start(command[module:], environment, log) as has_ended:
        yield has_ended


def run_ranks(*command: str, number: int = 2) -> None:
    """Runs ``python COMMAND`` on each rank and asserts that all succeed."""
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log, status = Path(folder) / "log", Path(folder) / "status"
        with (
            log.open("wb") as output,
            _ranks(number, list(command), environment, output, status) as has_ended,
        ):
            while not has_ended():
                time.sleep(0.02)
        assert status.read_text() == "0", log.read_text()[-5000:]


@contextmanager
def _ranks(
    number: int,
    command: list[str],
    environment: Mapping[str, str],
    log: IO[bytes],
    status: Path | None = None,
) -> Iterator[Callable[[], bool]]:
    """Runs a command on each rank, with the environment variables and the store of torchrun."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    torchrun = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    variables = {**environment, **torchrun}
    with forked(PRELOADED, command, variables, log, status=status, ranks=number) as has_ended:
        yield has_ended
