"""Starts a stage on this machine, waits until it ends, and explains why it failed.

The launcher runs a run's stages with this module. A search runs its candidates' stages with it.
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
STOP_SECONDS = 40
"""Time for a stage to end after SIGTERM; torchrun gives its ranks 30 seconds."""
TAIL_BYTES = 1 << 16
"""Bytes that ``tail`` reads, in addition to 256 for each line."""
RANK_VARIABLE = re.compile(r"(RANK|WORLD_SIZE)$|(TORCHELASTIC|GROUP|ROLE|LOCAL|MASTER)_")
"""Matches the names of the variables that torchrun sets in a rank."""
SINGLE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "SLURM_JOB_NAME": "interactive"}
"""Variables of a stage without torchrun. They replace those of a rank that starts the stage. In a
job with this name, Lightning does not take the job's tasks for ranks; with torchrun, it does not
look at the job."""
_FAILED_RANK = re.compile(
    r"time +: (?P<time>\d{4}-\d\d-\d\d_[\d:]{8})(?:.*\n)+?.*rank +: (?P<rank>\d+) "
    r"(?:.*\n)+?.*exitcode +: (?P<code>-?\d+)"
)
"""Matches the entry of one failed rank in torchrun's report."""
RunningStage = AbstractContextManager[Callable[[], bool]]
"""Yields a function that tells whether the stage has ended. Stops the stage if the block fails."""


def start_command(module: str, request_file: Path, devices: int, python: str) -> list[str]:
    """Returns the command of a stage on one machine.

    Args:
        module: Module of the stage.
        request_file: File with the stage's request.
        devices: Number of ranks. One rank starts without torchrun, which would take seconds.
        python: The Python interpreter.
    """
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", "-m"]
    return [python, "-m", *(torchrun if devices > 1 else []), WORKER, module, str(request_file)]


@contextmanager
def start_process(
    command: Sequence[str | Path], log: IO[bytes], env: Mapping[str, str] | None = None
) -> Iterator[Callable[[], bool]]:
    """Starts a command as a ``RunningStage`` whose output goes to a log."""
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
        # Waits, because after SIGTERM a training run first finishes its step or its validation.
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
    """Runs a stage until it ends.

    Args:
        name: The stage's name in messages.
        stage_dir: The stage's directory, with the request.
        fingerprint: The fingerprint that the result must have.
        start: Starts the stage; gets a log for the output.
        poll: Called repeatedly while the stage runs, and once afterwards.

    Raises:
        RecipeError: The stage ended without a new result; the message says why.
    """
    before = read_manifest(stage_dir)
    forget_outcome(stage_dir)
    log = _new_log(stage_dir / LOGS)
    with log.open("wb") as output, start(output) as has_ended:
        while not has_ended():
            poll()
            time.sleep(POLL_SECONDS)
    poll()
    # The manifest decides, not the exit status, which torchrun sets to 1 for any failure. A forced
    # rerun has the old result's fingerprint, and the old result stays until the rerun succeeds. So
    # the result must also be new.
    result = read_manifest(stage_dir)
    is_new = result is not None and (before is None or result.started_at != before.started_at)
    if result is None or result.fingerprint != fingerprint or not is_new:
        what = f"stage {name} failed: {failure(stage_dir, log)}\n  log: {log}"
        raise RecipeError(what, fix="")


def run_child(config: StageConfig, stage_dir: Path, inputs: Mapping[str, Path]) -> None:
    """Runs another stage as a child of this stage, unless the child is complete.

    A child with one device runs on this rank's device.

    Args:
        config: The child's settings.
        stage_dir: The child's directory, below this stage's ``work/``.
        inputs: Directories of complete stages.

    Raises:
        RecipeError: The child failed, or an input is not complete.
        StoppedByDeadlineError: The deadline passed before the child started, or the child stopped
            at the deadline. So this stage must stop, too.
    """
    request = request_of(config.name, config, {n: InputRef.of(d) for n, d in inputs.items()})
    if stage_state(stage_dir, request.fingerprint).status is Status.COMPLETE:
        return
    name = f"{stage_dir.name} of {stage_dir.parent.name}"
    require_time_left(name)
    devices = config.resources.devices
    file = request.write(stage_dir)
    command = start_command(module_of(config.stage), file, devices, sys.executable)
    try:
        with pause_watchdog():
            run_to_end(
                name,
                stage_dir,
                request.fingerprint,
                lambda log: start_process(command, log, _child_environment(devices)),
            )
    except RecipeError as error:
        status_and_reason = last_end(stage_dir)
        if status_and_reason is None or status_and_reason[0] is not Status.STOPPED:
            raise
        raise StoppedByDeadlineError(f"{name} stopped at the deadline.", error.fix) from error


def _child_environment(devices: int) -> dict[str, str]:
    """Returns this rank's environment without torchrun's variables.

    A child with one device runs on this rank's own device.
    """
    env = {name: value for name, value in os.environ.items() if not RANK_VARIABLE.match(name)}
    env["PYTHONPATH"] = str(REPO_ROOT)
    if devices == 1:
        env |= SINGLE_RANK
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        local_rank = os.environ.get("LOCAL_RANK", "0")
        if visible is None:
            env["CUDA_VISIBLE_DEVICES"] = local_rank
        elif visible:  # an empty value hides all GPUs
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(local_rank)]
    return env


def _new_log(logs: Path) -> Path:
    """Returns a path for a log, named after the time, with a number if that path exists."""
    logs.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    log, number = logs / f"{now}.log", 1
    while log.exists():
        number += 1
        log = logs / f"{now}-{number}.log"
    return log


def newest_log(stage_dir: Path) -> Path | None:
    """Returns the log with the latest change; ``None`` if there are no logs."""
    logs = (stage_dir / LOGS).glob("*.log")
    return max(logs, key=lambda log: log.stat().st_mtime_ns, default=None)


def tail(file: Path, lines: int) -> list[str]:
    """Returns the last lines of a text file without reading all of it."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - TAIL_BYTES - 256 * lines))
        text = opened.read().decode(errors="replace")
    return text.strip().splitlines()[-lines:] if lines else []


def failure(stage_dir: Path, log: Path | None) -> str:
    """Explains why the last start of a stage failed. Quotes the log if no reason is known."""
    if log is not None and (killed := _killed_rank(log)) is not None:
        return killed
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

    When a rank is killed, the other ranks lose their connection, and their errors would mislead.
    torchrun itself kills the other ranks 30 seconds after a failure; those kills are ignored.
    """
    failed = [
        (datetime.strptime(match["time"], "%Y-%m-%d_%H:%M:%S"), match["rank"], int(match["code"]))
        for match in _FAILED_RANK.finditer("\n".join(tail(log, 200)))
    ]
    first = min((time for time, _, _ in failed), default=datetime.min)
    for when, rank, code in failed:
        if code == -signal.SIGKILL and when < first + timedelta(seconds=10):
            return f"rank {rank} was {death_message(code)}"
    return None
