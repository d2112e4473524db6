"""Starts a stage as processes on this machine, waits for its end, and says why it failed.

The launcher starts the stages of a run here, and a search those of its candidates.
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
from recipes.core.manifest import read_manifest
from recipes.core.processes import die_with_parent, ended_by
from recipes.core.run_state import (
    InputRef,
    Status,
    forget_outcome,
    last_end,
    request_of,
    stage_state,
)
from recipes.core.stage import StageConfig
from recipes.core.watchdog import pause_watchdog

LOGS = "logs"
"""In a stage's directory: a log of each start."""
POLL_SECONDS = 0.2
STOP_SECONDS = 40
"""Time for a stage to end after SIGTERM; torchrun gives its ranks 30 of them."""
TAIL_BYTES = 1 << 16
OF_A_RANK = re.compile(r"(RANK|WORLD_SIZE)$|(TORCHELASTIC|GROUP|ROLE|LOCAL|MASTER)_")
"""Names of the variables that make a process one of several ranks."""
_FAILED_RANK = re.compile(
    r"time +: (?P<time>\d{4}-\d\d-\d\d_[\d:]{8})(?:.*\n)+?.*rank +: (?P<rank>\d+) "
    r"(?:.*\n)+?.*exitcode +: (?P<code>-?\d+)"
)

Begin = Callable[[IO[bytes]], AbstractContextManager[Callable[[], bool]]]
"""Starts a stage that writes to a log; yields whether it has ended; stops it on an error."""


def module_of(stage: str) -> str:
    """Module of a stage."""
    return f"recipes.stages.{stage}"


def start_command(module: str, config: Path, devices: int, python: str) -> list[str]:
    """Command of a stage on one machine; torchrun, which takes seconds, only for several ranks."""
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", "-m"]
    return [python, "-m", *(several if devices > 1 else []), module, "--config", str(config)]


@contextmanager
def started(
    command: Sequence[str | Path], log: IO[bytes], env: Mapping[str, str] | None = None
) -> Iterator[Callable[[], bool]]:
    """Starts a command that writes to a log; yields whether it has ended."""
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=env,
        preexec_fn=die_with_parent,
    )

    def ended() -> bool:
        if (status := process.poll()) is not None and (said := ended_by(status)):
            log.write(f"{said}\n".encode())
            log.flush()
        return status is not None

    try:
        yield ended
    except BaseException:
        process.terminate()
        # A training ends its step, or its validation, first.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_SECONDS)
        process.kill()
        process.wait()
        raise


def run_to_end(
    name: str,
    stage_dir: Path,
    fingerprint: str,
    begin: Begin,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Runs a stage to its end.

    Args:
        name: The stage's name in messages.
        stage_dir: Its directory, which holds its request.
        fingerprint: That its result must have.
        begin: Starts it.
        poll: Is called while it runs, and once afterwards.

    Raises:
        RecipeError: It ended without a new result; says why.
    """
    before = read_manifest(stage_dir)
    forget_outcome(stage_dir)
    log = _new_log(stage_dir / LOGS)
    with log.open("wb") as output, begin(output) as ended:
        while not ended():
            poll()
            time.sleep(POLL_SECONDS)
    poll()
    # The exit status says little: torchrun's is always 1. A forced stage keeps its old result, of
    # the same fingerprint, until it has succeeded.
    result = read_manifest(stage_dir)
    new = result is not None and (before is None or result.started_at != before.started_at)
    if result is None or result.fingerprint != fingerprint or not new:
        what = f"stage {name} failed: {failure(stage_dir, log)}\n  log: {log}"
        raise RecipeError(what, fix="")


def run_child(config: StageConfig, stage_dir: Path, inputs: Mapping[str, Path]) -> None:
    """Runs a stage that another stage needs, on this rank's device, unless it is complete.

    Args:
        config: Its settings.
        stage_dir: Its directory, below the ``work/`` of the other.
        inputs: Directories of complete stages.

    Raises:
        RecipeError: It failed, or an input is not complete.
    """
    request = request_of(config.stage, config, {n: InputRef.of(d) for n, d in inputs.items()})
    if stage_state(stage_dir, request.fingerprint).status is Status.COMPLETE:
        return
    devices = config.resources.devices
    file = request.write(stage_dir)
    command = start_command(module_of(config.stage), file, devices, sys.executable)
    with pause_watchdog():
        run_to_end(
            f"{stage_dir.name} of {stage_dir.parent.name}",
            stage_dir,
            request.fingerprint,
            lambda log: started(command, log, _child_environment(devices)),
        )


def _child_environment(devices: int) -> dict[str, str]:
    """Variables of this rank without those that make it a rank; one device is the rank's own."""
    env = {name: value for name, value in os.environ.items() if not OF_A_RANK.match(name)}
    env["PYTHONPATH"] = str(REPO_ROOT)
    if devices == 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
    return env


def _new_log(logs: Path) -> Path:
    """Returns a log that does not exist yet, whatever the clock says."""
    logs.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    log, starts = logs / f"{now}.log", 1
    while log.exists():
        starts += 1
        log = logs / f"{now}-{starts}.log"
    return log


def newest_log(stage_dir: Path) -> Path | None:
    """The log that was written to last."""
    logs = list((stage_dir / LOGS).glob("*.log"))
    return max(logs, key=lambda log: log.stat().st_mtime_ns) if logs else None


def tail(file: Path, lines: int) -> list[str]:
    """The last lines of a text file, however large it is."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - TAIL_BYTES - 256 * lines))
        text = opened.read().decode(errors="replace")
    return text.strip().splitlines()[-lines:] if lines else []


def failure(stage_dir: Path, log: Path | None) -> str:
    """Says why the last start of a stage failed: in its own words, or the last lines of its log."""
    if log is not None and (killed := _killed_rank(log)) is not None:
        return killed
    if (end := last_end(stage_dir)) is not None:
        return end[1].strip()
    if (problem := storage_problem(None, stage_dir)) is not None:
        return str(problem)
    if log is None:
        return "it ended without a message or a log"
    shown = "\n    ".join(tail(log, 5))
    return f"it ended without a message; the log's last lines are\n    {shown}"


def _killed_rank(log: Path) -> str | None:
    """Says which rank was killed, by torchrun's report; the others then lost their connection.

    Ranks that torchrun itself kills, half a minute after another one failed, do not count.
    """
    found = [
        (datetime.strptime(each["time"], "%Y-%m-%d_%H:%M:%S"), each["rank"], int(each["code"]))
        for each in _FAILED_RANK.finditer("\n".join(tail(log, 200)))
    ]
    soon = min((when for when, _, _ in found), default=datetime.min) + timedelta(seconds=10)
    killed = [rank for when, rank, code in found if code == -signal.SIGKILL and when < soon]
    return f"rank {killed[0]} was {ended_by(-signal.SIGKILL)}" if killed else None
