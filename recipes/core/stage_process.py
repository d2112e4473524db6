"""Starts a stage on this machine, waits until it ends, and explains why it failed.

The launcher uses this module for the stages of a run. A search stage uses it for the stages of each
candidate, which are called children.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO

from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT, storage_problem
from recipes.core.fingerprint import WORKER, module_of
from recipes.core.manifest import read_manifest
from recipes.core.processes import death_message, die_with_parent, sigterm_ignored
from recipes.core.run_state import (
    InputRef,
    Status,
    forget_outcome,
    last_end,
    request_of,
    stage_state,
)
from recipes.core.stage import StageConfig, StoppedByDeadlineError, require_time_left
from recipes.core.watchdog import pause_watchdog

LOGS = "logs"
"""Folder in a stage's directory, with one log for each start."""
POLL_SECONDS = 0.2
"""Time between two checks of whether a stage has ended."""
STOP_SECONDS = 40
"""Maximum wait for a stage to end after SIGTERM. torchrun waits 30 seconds for its ranks."""
TAIL_BYTES, LINE_BYTES = 1 << 16, 256
"""``tail`` reads the last ``TAIL_BYTES``, and ``LINE_BYTES`` more for each requested line."""
RANK_VARIABLE = re.compile(r"(RANK|WORLD_SIZE)$|(TORCHELASTIC|GROUP|ROLE|LOCAL|MASTER)_")
"""Matches the names of the variables that torchrun sets in a rank."""
SINGLE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "SLURM_JOB_NAME": "interactive"}
"""Environment variables of a stage that runs without torchrun. They replace the variables that a
child inherits. Lightning takes the tasks of a Slurm job for ranks, unless the job's name is
``interactive``."""
_FAILED_RANK = re.compile(
    r"time +: (?P<time>\d{4}-\d\d-\d\d_[\d:]{8})(?:.*\n)+?.*rank +: (?P<rank>\d+) "
    r"(?:.*\n)+?.*exitcode +: (?P<code>-?\d+)"
)
"""Matches the entry of one failed rank in torchrun's report, which has these lines among others::

      time      : 2026-01-31_06:00:00
      rank      : 1 (local_rank: 1)
      exitcode  : -9 (pid: 1235)
"""
TEARDOWN_SECONDS = 10
"""A rank that is killed later than this after the first failed rank was killed by torchrun, which
kills the other ranks after 30 seconds."""
RunningStage = AbstractContextManager[Callable[[], bool]]
"""Context manager of a started stage. Yields a function that returns whether the stage has ended.
Stops the stage if the block raises an exception."""


def start_command(module: str, request_file: Path, devices: int, python: str) -> list[str]:
    """Returns the command that starts a stage on this machine.

    ``devices`` is the number of ranks. One rank runs without torchrun, which saves seconds.
    """
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", "-m"]
    return [python, "-m", *(torchrun if devices > 1 else []), WORKER, module, str(request_file)]


@contextmanager
def start_process(
    command: Sequence[str | Path], log: IO[bytes], env: Mapping[str, str] | None = None
) -> Iterator[Callable[[], bool]]:
    """Starts a command as a ``RunningStage``. ``log`` gets the output and any killing signal."""
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=env,
        preexec_fn=die_with_parent,
    )

    def has_ended() -> bool:
        status = process.poll()
        if message := death_message(status):
            log.write(f"{message}\n".encode())
            log.flush()
        return status is not None

    try:
        yield has_ended
    except BaseException:
        process.terminate()
        # After SIGTERM, a training run first finishes its step or its validation.
        with sigterm_ignored(), contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_SECONDS)
        process.kill()
        process.wait()
        raise


def run_to_end(
    name: str,
    stage_dir: Path,
    fingerprint: str,
    start: Callable[[IO[bytes]], RunningStage],
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Starts a stage and waits until it ends.

    Args:
        name: The stage's name in messages.
        stage_dir: The stage's directory, with the request.
        fingerprint: The fingerprint that the result must have.
        start: Starts the stage. Its argument is the log file for the stage's output.
        poll: Called every ``POLL_SECONDS`` while the stage runs, and once afterwards.

    Raises:
        RecipeError: The stage ended without a new result; the message says why.
    """
    old_result = read_manifest(stage_dir)
    forget_outcome(stage_dir)
    log = _new_log(stage_dir / LOGS)
    with log.open("wb") as output, start(output) as has_ended:
        while not has_ended():
            poll()
            time.sleep(POLL_SECONDS)
    poll()
    result = read_manifest(stage_dir)
    # The manifest decides whether the stage succeeded. After a forced rerun that failed, the old
    # manifest is still there, with the required fingerprint.
    is_old = result and old_result and result.started_at == old_result.started_at
    if result is None or result.fingerprint != fingerprint or is_old:
        reason = failure(stage_dir, log)  # usually with a fix
        raise RecipeError(f"stage {name} failed: {reason}\n  log: {log}", fix="")


def run_child(config: StageConfig, stage_dir: Path, inputs: Mapping[str, Path]) -> None:
    """Runs a stage as a child of this process's stage, unless the child is complete.

    Args:
        config: The child's settings. A child with one device runs on this rank's device.
        stage_dir: The child's directory, below this stage's ``work/``.
        inputs: The stage directory of each of the child's inputs, by the input's name.

    Raises:
        RecipeError: The child failed, or an input is not complete.
        StoppedByDeadlineError: The deadline passed before the child started, or the child stopped
            at the deadline. This stage must then stop, too.
    """
    refs = {input_name: InputRef.of(directory) for input_name, directory in inputs.items()}
    request = request_of(config.name, config, refs)
    if stage_state(stage_dir, request.fingerprint).status is Status.COMPLETE:
        return
    name = f"{stage_dir.name} of {stage_dir.parent.name}"
    require_time_left(name)
    devices = config.resources.devices
    request_file = request.write(stage_dir)
    command = start_command(module_of(config.stage), request_file, devices, sys.executable)
    try:
        with pause_watchdog():
            run_to_end(
                name,
                stage_dir,
                request.fingerprint,
                lambda log: start_process(command, log, _child_environment(devices)),
            )
    except RecipeError as error:
        status, _ = last_end(stage_dir) or (None, "")
        if status is not Status.STOPPED:
            raise
        raise StoppedByDeadlineError(f"{name} stopped at the deadline.", error.fix) from error


def _child_environment(devices: int) -> dict[str, str]:
    """Returns the environment of a child: this rank's, without torchrun's variables.

    A child with one device sees only this rank's GPU.
    """
    env = {name: value for name, value in os.environ.items() if not RANK_VARIABLE.match(name)}
    # This process's code comes first. Empty and repeated paths are left out.
    paths = [str(REPO_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    if devices == 1:
        env |= SINGLE_RANK
        visible_gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        local_rank = os.environ.get("LOCAL_RANK", "0")
        if visible_gpus is None:
            env["CUDA_VISIBLE_DEVICES"] = local_rank
        # A list such as "" or "-1", which hides all GPUs, has no entry for this rank: it stays.
        elif int(local_rank) < len(gpus := visible_gpus.split(",")):
            env["CUDA_VISIBLE_DEVICES"] = gpus[int(local_rank)]
    return env


def _new_log(logs: Path) -> Path:
    """Returns an unused path for a log. Its name is the time, and a number if necessary."""
    logs.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    log, number = logs / f"{now}.log", 1
    while log.exists():
        number += 1
        log = logs / f"{now}-{number}.log"
    return log


def newest_log(stage_dir: Path) -> Path | None:
    """Returns the stage's most recently changed log; ``None`` if there are no logs."""
    logs = (stage_dir / LOGS).glob("*.log")
    return max(logs, key=lambda log: log.stat().st_mtime_ns, default=None)


def tail(file: Path, lines: int) -> list[str]:
    """Returns the last ``lines`` lines of a text file without reading all of it."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL_BYTES - LINE_BYTES * lines))
        text = stream.read().decode(errors="replace")
    return text.strip().splitlines()[-lines:] if lines else []  # ``[-0:]`` has all lines


def failure(stage_dir: Path, log: Path | None) -> str:
    """Explains why the last start of a stage failed.

    Returns the first that is known: the rank that was killed, the reason that the stage recorded, a
    problem of the disk, or the log's last lines.
    """
    if log is not None and (killed_rank := _killed_rank(log)) is not None:
        return killed_rank
    if (status_and_reason := last_end(stage_dir)) is not None:
        _, reason = status_and_reason
        return reason.strip()
    if (problem := storage_problem(None, stage_dir)) is not None:
        return str(problem)
    if log is None:
        return "it ended without a message or a log"
    last_lines = "\n    ".join(tail(log, 5))
    return f"it ended without a message; the log's last lines are\n    {last_lines}"


def _killed_rank(log: Path) -> str | None:
    """Says which rank was killed, according to torchrun's report in the log; ``None`` if none was.

    The other ranks then lose their connection, and their errors would mislead. Ignores ranks that
    torchrun killed because another rank had failed.
    """
    failed_ranks = [
        (datetime.strptime(match["time"], "%Y-%m-%d_%H:%M:%S"), match["rank"], int(match["code"]))
        for match in _FAILED_RANK.finditer("\n".join(tail(log, 200)))  # the report is at the end
    ]
    first_failure = min((failed_at for failed_at, _, _ in failed_ranks), default=datetime.min)
    for failed_at, rank, exit_code in failed_ranks:
        is_teardown = failed_at >= first_failure + timedelta(seconds=TEARDOWN_SECONDS)
        if exit_code == -signal.SIGKILL and not is_teardown:
            return f"rank {rank} was {death_message(exit_code)}"
    return None
