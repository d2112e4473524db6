"""Commands beside running a recipe: ``python launch/run.py status run_dir=DIR``."""

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
from launch.compare import compare
from launch.console import headline
from launch.executors import slurm_queue
from launch.run_status import StageStatus, read_statuses, run_left
from launch.runs import runs
from launch.time_left import in_words
from recipes.core.errors import RecipeError, did_you_mean, require_known
from recipes.core.run_state import Status
from recipes.core.screen import plain_table
from recipes.core.starting import newest_log, tail
from recipes.report.runs import find_runs

STYLES = {
    Status.COMPLETE: "green",
    Status.RUNNING: "bold",
    Status.FAILED: "red",
    Status.HUNG: "red",
}
WAIT_SECONDS, ASK_AGAIN_SECONDS = 60.0, 10.0
Options = Mapping[str, str]


def status(options: Options, console: Console) -> None:
    """Shows what has become of each stage."""
    for run_dir in find_runs([_directory(options)]):
        table = plain_table(str(run_dir), "stage", "state", "job", "")
        statuses = read_statuses(run_dir)
        for stage in statuses:
            style = STYLES.get(stage.status, "dim")
            job = stage.job.id if stage.job else ""
            table.add_row(stage.name, f"[{style}]{stage.status}", job, escape(_detail(stage)))
        console.print(table)
        if left := run_left(run_dir, statuses):
            console.print(f"about {in_words(left)} left of the run")


def _detail(stage: StageStatus) -> str:
    result = headline(stage.result) if stage.result else ""
    return f"{stage.detail}  {result}".strip()


def cancel(options: Options, console: Console) -> None:
    """Stops what runs: Slurm jobs, or the launcher that runs stages on this machine."""
    stopped = False
    for run_dir in find_runs([_directory(options)]):
        active = slurm_queue.active_jobs(run_dir)
        if active:
            slurm_queue.cancel(job for job, _ in active.values())
            for stage, (job, _) in active.items():
                console.print(f"{stage}: job {job.id} cancelled")
        held = lock.holder(run_dir)
        if held is not None:
            _stop(held, run_dir)
            console.print(f"{run_dir}: stopped at {held.stage}")
        stopped = stopped or bool(active) or held is not None
    console.print("the same command resumes" if stopped else "nothing runs")


def _stop(held: lock.Holder, run_dir: Path) -> None:
    if held.host != socket.gethostname():
        raise RecipeError(
            f"{run_dir} is run by process {held.pid} on {held.host}.", "cancel it there"
        )
    deadline, asked = time.monotonic() + WAIT_SECONDS, 0.0
    while (now := lock.holder(run_dir)) is not None and now.pid == held.pid:
        if time.monotonic() > deadline:
            raise RecipeError(f"process {held.pid} does not stop.", f"kill -9 {held.pid}")
        # Again after a while: Python loses an interrupt that comes while it forks a process.
        if time.monotonic() - asked > ASK_AGAIN_SECONDS:
            with contextlib.suppress(ProcessLookupError):
                os.kill(held.pid, signal.SIGTERM)
            asked = time.monotonic()
        time.sleep(0.1)


def logs(options: Options, console: Console) -> None:
    """Prints the end of a stage's newest log; by default of the one that failed or runs."""
    [run_dir, *others] = find_runs([_directory(options)])
    if others:
        raise RecipeError(f"{run_dir.parent} is a sweep.", f"give one of it: run_dir={run_dir}")
    statuses = read_statuses(run_dir)
    name = options.get("stage") or _interesting(run_dir, statuses)
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


def _interesting(run_dir: Path, statuses: Sequence[StageStatus]) -> str:
    for status in (Status.FAILED, Status.HUNG, Status.RUNNING):
        for stage in statuses:
            if stage.status is status:
                return stage.name
    started = [stage.name for stage in statuses if newest_log(run_dir / stage.name)]
    if not started:
        raise RecipeError(
            f"no stage of {run_dir} has been started.",
            "give the command that planned it again, without dry_run=true",
        )
    return started[-1]


RUN_COMMANDS: Mapping[str, tuple[Callable[[Options, Console], None], tuple[str, ...]]] = {
    "status": (status, ("run_dir", "recipe")),
    "cancel": (cancel, ("run_dir", "recipe")),
    "logs": (logs, ("run_dir", "recipe", "stage", "lines")),
}
"""About one run, with the options that they take."""


def _compare(words: Sequence[str], console: Console) -> int:
    console.print(compare(words))
    return 0


OTHERS: Mapping[str, Callable[[Sequence[str], Console], int]] = {
    "compare": _compare,
    "doctor": doctor.run,
    "runs": runs,
}
"""With words of their own; they return the exit status."""


def is_command(words: Sequence[str]) -> bool:
    """Whether a command line is one of these, and not a recipe for Hydra."""
    return bool(words) and (words[0] in RUN_COMMANDS or words[0] in OTHERS)


def run(words: Sequence[str], console: Console) -> int:
    """Runs a command line such as ``status run_dir=DIR``, or refuses it; returns the status."""
    if words[0] in OTHERS:
        return OTHERS[words[0]](words[1:], console)
    command, known = RUN_COMMANDS[words[0]]
    options = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise RecipeError(
                f"{words[0]} does not know '{word}'.{did_you_mean(key, known)}",
                f"it takes {', '.join(f'{name}=…' for name in known)}",
            )
        options[key] = value
    command(options, console)
    return 0


def _directory(options: Options) -> Path:
    if given := options.get("run_dir"):
        return Path(given).resolve()
    if recipe := options.get("recipe"):
        return Path("runs", recipe).resolve()
    raise RecipeError("which run?", "add run_dir=DIR, or recipe=NAME for runs/NAME")
