"""Commands about existing runs and this machine: ``python launch/run.py status run_dir=DIR``."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from launch import doctor, lock
from launch.console import headline
from launch.executors import slurm_queue
from launch.progress import format_seconds
from launch.run_status import StageStatus, read_statuses, time_left
from launch.runs import runs
from recipes.core.errors import RecipeError, did_you_mean, require_known
from recipes.core.run_state import Status
from recipes.core.screen import plain_table
from recipes.core.stage_process import newest_log, tail
from recipes.report.runs import find_runs

STYLES = {
    Status.COMPLETE: "green",
    Status.RUNNING: "bold",
    Status.FAILED: "red",
    Status.HUNG: "red",
}
STOP_SECONDS, SIGNAL_SECONDS = 60.0, 10.0
"""Time that a launcher has to stop, and time between two signals to it."""
Options = Mapping[str, str]


def status(options: Options, console: Console) -> None:
    """Shows the status of each stage."""
    for run_dir in find_runs([_directory(options)]):
        table = plain_table(str(run_dir), "stage", "status", "job", "")
        statuses = read_statuses(run_dir)
        for stage in statuses:
            style = STYLES.get(stage.status, "dim")
            job = stage.job.id if stage.job else ""
            result = headline(stage.result) if stage.result else ""
            detail = escape(f"{stage.detail}  {result}".strip())
            table.add_row(stage.name, f"[{style}]{stage.status}", job, detail)
        console.print(table)
        if left := time_left(run_dir, statuses):
            console.print(f"about {format_seconds(left)} left of the run")


def cancel(options: Options, console: Console) -> None:
    """Cancels a run's Slurm jobs, and stops the launcher that runs its stages on this machine."""
    stopped = False
    for run_dir in find_runs([_directory(options)]):
        active = slurm_queue.active_jobs(run_dir)
        if active:
            slurm_queue.cancel(job for job, _ in active.values())
            for stage, (job, _) in active.items():
                console.print(f"{stage}: job {job.id} cancelled")
        holder = lock.read_holder(run_dir)
        if holder is not None:
            _stop(holder, run_dir)
            console.print(f"{run_dir}: stopped at {holder.stage}")
        stopped = stopped or bool(active) or holder is not None
    console.print("the same command resumes" if stopped else "nothing runs")


def _stop(holder: lock.Holder, run_dir: Path) -> None:
    if holder.host != socket.gethostname():
        raise RecipeError(
            f"{run_dir} is run by process {holder.pid} on {holder.host}.", "cancel it there"
        )
    deadline, next_signal = time.monotonic() + STOP_SECONDS, 0.0
    while (now := lock.read_holder(run_dir)) is not None and now.pid == holder.pid:
        if time.monotonic() > deadline:
            raise RecipeError(f"process {holder.pid} does not stop.", f"kill -9 {holder.pid}")
        # Python loses a signal that arrives while it forks a process, so send more.
        if time.monotonic() > next_signal:
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder.pid, signal.SIGTERM)
            next_signal = time.monotonic() + SIGNAL_SECONDS
        time.sleep(0.1)


def logs(options: Options, console: Console) -> None:
    """Prints the end of a stage's newest log; by default of the stage that failed or runs."""
    [run_dir, *others] = find_runs([_directory(options)])
    if others:
        raise RecipeError(f"{run_dir.parent} is a sweep.", f"choose one run: run_dir={run_dir}")
    statuses = read_statuses(run_dir)
    name = options.get("stage") or _default_stage(run_dir, statuses)
    known = [stage.name for stage in statuses]
    require_known(name, known, f"{run_dir} has no stage '{name}'")
    if (log := newest_log(run_dir / name)) is None:
        raise RecipeError(
            f"{name} has not been started: it has no log.",
            f"see what runs before it: python launch/run.py status run_dir={run_dir}",
        )
    lines = options.get("lines", "50")
    if not lines.isdigit():
        raise RecipeError(f"lines={lines} is not a number.", "lines=50")
    console.print(f"{log}:")
    for line in tail(log, int(lines)):
        console.print(line, markup=False)


def _default_stage(run_dir: Path, statuses: Sequence[StageStatus]) -> str:
    for status in (Status.FAILED, Status.HUNG, Status.RUNNING):
        for stage in statuses:
            if stage.status is status:
                return stage.name
    started = [stage.name for stage in statuses if newest_log(run_dir / stage.name)]
    if not started:
        raise RecipeError(
            f"no stage of {run_dir} has been started.",
            "repeat the command that planned it, without dry_run=true",
        )
    return started[-1]


def compare(words: Sequence[str], console: Console) -> int:
    """Writes one page about several runs: ``compare RUN1 RUN2 [out=FILE]``."""
    from recipes.report.compare import render_comparison, verdict

    options = [word for word in words if word.startswith("out=")]
    paths = [Path(word) for word in words if word not in options]
    unknown = [word for word in words if word.startswith("-")]
    if not paths or len(options) > 1 or unknown:
        raise RecipeError(
            "compare needs the directories of runs.",
            "python launch/run.py compare RUN1 RUN2 [out=FILE], or one directory of a sweep",
        )
    out = Path(options[0].removeprefix("out=") if options else "compare.html")
    if out.is_dir() or not out.parent.is_dir():
        raise RecipeError(f"out={out} cannot be written.", "name a file in a directory that exists")
    rows = render_comparison(paths, out)
    console.print(f"{len(rows)} runs compared in {out}\n{verdict(rows)}")
    return 0


RUN_COMMANDS: Mapping[str, tuple[Callable[[Options, Console], None], tuple[str, ...]]] = {
    "status": (status, ("run_dir", "recipe")),
    "cancel": (cancel, ("run_dir", "recipe")),
    "logs": (logs, ("run_dir", "recipe", "stage", "lines")),
}
"""Commands about one run or sweep, with their options."""
OTHER_COMMANDS: Mapping[str, Callable[[Sequence[str], Console], int]] = {
    "compare": compare,
    "doctor": doctor.run,
    "runs": runs,
}
"""Commands that parse their own words and return the exit status."""


def run(words: Sequence[str], console: Console) -> int | None:
    """Runs a command such as ``status run_dir=DIR`` and returns the exit status.

    Returns ``None`` if the words are not a command but overrides for Hydra.
    """
    name = words[0] if words else ""
    if name in OTHER_COMMANDS:
        return OTHER_COMMANDS[name](words[1:], console)
    if name not in RUN_COMMANDS:
        return None
    command, known = RUN_COMMANDS[name]
    options = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise RecipeError(
                f"{name} does not know '{word}'.{did_you_mean(key, known)}",
                f"it takes {', '.join(f'{option}=…' for option in known)}",
            )
        options[key] = value
    command(options, console)
    return 0


def _directory(options: Options) -> Path:
    if directory := options.get("run_dir"):
        return Path(directory)
    if recipe := options.get("recipe"):
        return Path("runs", recipe)
    raise RecipeError("which run?", "add run_dir=DIR, or recipe=NAME for runs/NAME")
