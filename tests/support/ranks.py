"""Runs several ranks as torchrun does, but in forks of a process that has imported NeMo.

Forks save the seconds that each rank would spend on imports. The real torchrun starts ranks in
``tests/cpu/core``, ``tests/slurm``, and in tests that kill ranks.
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
    """Starts the ranks of a stage; yields a function that tells whether all have ended."""
    environment = {**os.environ, **local.environment(stage, LocalConfig())}
    with fork_command(local.command(stage, sys.executable), environment, log) as has_ended:
        yield has_ended


@contextmanager
def fork_command(
    command: list[str], environment: Mapping[str, str], log: IO[Any]
) -> Iterator[Callable[[], bool]]:
    """Runs the module of a command in a fork. For a torchrun command, each rank is a fork.

    Args:
        command: ``python -m MODULE ...``, or ``python -m torch.distributed.run ... -m MODULE ...``.
        environment: All environment variables of the command.
        log: File for standard output and standard error.

    Yields:
        A function that tells whether all forks have ended.
    """
    last_m = len(command) - command[::-1].index("-m") - 1  # index of the last -m, before MODULE
    nproc = [word.partition("=")[2] for word in command if word.startswith("--nproc-per-node=")]
    start = partial(_ranks, int(nproc[0])) if nproc else partial(forked, PRELOADED)
    with start(command[last_m:], environment, log) as has_ended:
        yield has_ended


def run_ranks(*command: str, number: int = 2) -> None:
    """Runs ``python COMMAND`` on ``number`` ranks and asserts that all exit with status 0."""
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
    num_ranks: int,
    command: list[str],
    environment: Mapping[str, str],
    log: IO[bytes],
    status: Path | None = None,
) -> Iterator[Callable[[], bool]]:
    """Runs a command on each rank, with the environment variables and the store of torchrun.

    ``forked`` adds ``RANK`` and ``LOCAL_RANK``.

    Args:
        num_ranks: Number of ranks.
        command: Arguments of Python.
        environment: Environment variables to which those of torchrun are added.
        log: File for standard output and standard error of all ranks.
        status: File for the largest exit status of a rank; ``None`` for no file.

    Yields:
        A function that tells whether all ranks have ended.
    """
    from torch.distributed import TCPStore

    # Port 0 means any free port. Ranks may connect at any time.
    store = TCPStore("127.0.0.1", port=0, is_master=True, wait_for_workers=False)
    torchrun_variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    variables = {**environment, **torchrun_variables}
    with forked(PRELOADED, command, variables, log, status=status, ranks=num_ranks) as has_ended:
        yield has_ended
