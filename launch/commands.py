"""Commands about existing runs and this machine: ``python launch/run.py status run_dir=DIR``."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from launch import doctor, lock
from launch.console import headline
from launch.progress import format_seconds
from launch.run_status import StageStatus, read_statuses, time_left
from launch.slurm_queue import active_jobs, cancel_jobs
from launch.sweep import SWEEP_FILE
from recipes.core.errors import RecipeError, did_you_mean, require_known
from recipes.core.files import folder_bytes, read_yaml
from recipes.core.manifest import MANIFEST
from recipes.core.run_state import REQUEST, RUN_FILE, Status
from recipes.core.screen import plain_table
from recipes.core.snapshot import CODE
from recipes.core.stage_process import newest_log, tail
from recipes.report.runs import find_runs, read_run, runs_below

STYLES = {
    Status.COMPLETE: "green",
    Status.RUNNING: "bold",
    Status.FAILED: "red",
    Status.HUNG: "red",
}
STOP_SECONDS, SIGNAL_SECONDS = 60.0, 10.0
"""How long ``cancel`` waits for a launcher to stop, and the time between two signals to it."""
ROOT = Path("runs")
"""Default folder of runs."""
YES = "--yes"
"""Option of ``runs clean``: delete. Without it, the command only lists what it would delete."""
AGE_UNITS = (("days", 86400), ("h", 3600), ("min", 60))
"""Units of an age, largest first, and the seconds of each."""
INCOMPLETE = (
    Status.RUNNING,
    Status.FAILED,
    Status.HUNG,
    Status.STOPPED,
    Status.INTERRUPTED,
    Status.PENDING,
)
"""Statuses, most important first. The command ``runs`` shows a run's most important status."""
Options = Mapping[str, str]
"""Arguments ``NAME=VALUE`` of a command, such as ``run_dir=DIR``, by name."""


def status(options: Options, console: Console) -> None:
    """Shows the status of each stage of a run, or of all runs of a sweep."""
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
        if seconds := time_left(run_dir, statuses):
            console.print(f"about {format_seconds(seconds)} left of the run")


def cancel(options: Options, console: Console) -> None:
    """Cancels the Slurm jobs of a run or sweep, and stops launchers that run it on this machine."""
    stopped_any = False
    for run_dir in find_runs([_directory(options)]):
        jobs = {stage: job for stage, (job, _) in active_jobs(run_dir).items()}
        if jobs:
            cancel_jobs(jobs.values())
            for stage, job in jobs.items():
                console.print(f"{stage}: job {job.id} cancelled")
        holder = lock.read_holder(run_dir)
        if holder is not None:
            _stop(holder, run_dir)
            where = f" at {holder.stage}" if holder.stage else " between stages"
            console.print(f"{run_dir}: stopped{where}")
        stopped_any = stopped_any or bool(jobs) or holder is not None
    console.print("the command that started the run resumes it" if stopped_any else "nothing runs")


def _stop(holder: lock.Holder, run_dir: Path) -> None:
    """Sends SIGTERM to the launcher that holds a run's lock, and waits until the lock is released.

    Raises:
        RecipeError: The launcher runs on another machine, belongs to another user or does not stop.
    """
    if holder.host != socket.gethostname():
        raise RecipeError(
            f"{run_dir} is run by process {holder.pid} on {holder.host}.", "cancel it there"
        )
    deadline, next_signal = time.monotonic() + STOP_SECONDS, 0.0
    while (current := lock.read_holder(run_dir)) is not None and current.pid == holder.pid:
        if time.monotonic() > deadline:
            raise RecipeError(f"process {holder.pid} does not stop.", f"kill -9 {holder.pid}")
        # Python loses a signal that arrives while it forks a process, so repeat the signal.
        if time.monotonic() > next_signal:
            try:
                os.kill(holder.pid, signal.SIGTERM)
            except ProcessLookupError:
                pass
            except PermissionError as error:
                what = f"process {holder.pid} runs {run_dir}, and belongs to another user."
                raise RecipeError(what, "ask this user to cancel the run") from error
            next_signal = time.monotonic() + SIGNAL_SECONDS
        time.sleep(0.1)


def logs(options: Options, console: Console) -> None:
    """Prints the end of a stage's newest log."""
    [run_dir, *other_runs] = find_runs([_directory(options)])
    if other_runs:
        raise RecipeError(f"{run_dir.parent} is a sweep.", f"choose one run: run_dir={run_dir}")
    statuses = read_statuses(run_dir)
    name = options.get("stage") or _default_stage(run_dir, statuses)
    stage_names = [stage.name for stage in statuses]
    require_known(name, stage_names, f"{run_dir} has no stage '{name}'")
    if (log := newest_log(run_dir / name)) is None:
        raise RecipeError(
            f"{name} has not been started: it has no log.",
            f"see what runs before it: python launch/run.py status run_dir={run_dir}",
        )
    num_lines = options.get("lines", "50")
    if not num_lines.isdigit():
        raise RecipeError(f"lines={num_lines} is not a number.", "set a number, such as lines=50")
    console.print(f"{log}:")
    for line in tail(log, int(num_lines)):
        console.print(line, markup=False)


def _default_stage(run_dir: Path, statuses: Sequence[StageStatus]) -> str:
    """Returns the first stage that failed, hung or is running, in this order of preference.

    If there is none, returns the last stage that was started, or raises ``RecipeError``.
    """
    for status in (Status.FAILED, Status.HUNG, Status.RUNNING):
        for stage in statuses:
            if stage.status is status:
                return stage.name
    started_stages = [stage.name for stage in statuses if newest_log(run_dir / stage.name)]
    if not started_stages:
        raise RecipeError(
            f"no stage of {run_dir} has been started.",
            "repeat the command that planned it, without dry_run=true",
        )
    return started_stages[-1]


def compare(arguments: Sequence[str], console: Console) -> int:
    """Writes an HTML page that compares several runs: ``compare RUN1 RUN2 [out=FILE]``."""
    from recipes.report.compare import describe_best, render_comparison

    options = [arg for arg in arguments if arg.startswith("out=")]
    paths = [Path(arg) for arg in arguments if arg not in options]
    has_flag = any(arg.startswith("-") for arg in arguments)  # compare has no flags
    if not paths or len(options) > 1 or has_flag:
        raise RecipeError(
            "compare needs the directories of runs.",
            "python launch/run.py compare RUN1 RUN2 [out=FILE], or one directory of a sweep",
        )
    out = Path(options[0].removeprefix("out=") if options else "compare.html")
    if out.is_dir() or not out.parent.is_dir():
        raise RecipeError(f"out={out} cannot be written.", "name a file in a directory that exists")
    rows = render_comparison(paths, out)
    console.print(f"{len(rows)} runs compared in {out}\n{describe_best(rows)}")
    return 0


def runs(arguments: Sequence[str], console: Console) -> int:
    """Lists the runs in a directory, or deletes runs: ``runs [DIR]`` or ``runs clean RUN``."""
    if list(arguments[:1]) == ["clean"]:
        names = [arg for arg in arguments[1:] if arg != YES]
        _clean(names, confirmed=YES in arguments, console=console)
        return 0
    if len(arguments) > 1 or any(arg.startswith("-") for arg in arguments):
        raise RecipeError(
            f"runs does not know '{' '.join(arguments)}'.", "runs [DIR], or runs clean RUN"
        )
    root = Path(arguments[0]) if arguments else ROOT
    paths = runs_below(root)
    if not paths:
        raise RecipeError(f"there is no run in {root.resolve()}.", "runs DIR")
    columns = ("run", "recipe", "state", "quality", "speed", "parameters", "disk", "age")
    table = plain_table(str(root), *columns)
    for path in paths:
        table.add_row(*map(escape, _table_row(path, root)))
    console.print(table)
    return 0


def _table_row(path: Path, root: Path) -> tuple[str, ...]:
    """Returns a run's row in the table of ``runs``."""
    name, age = str(path.relative_to(root)), _age(path)
    disk = f"{folder_bytes(path) / 1e9:.2f} GB"
    try:
        record, state = read_run(path), _run_state(read_statuses(path.resolve()))
    except RecipeError:  # an unreadable run must not hide the other runs
        return name, "", "unreadable: see status", "", "", "", disk, age
    exported = record.exported
    parameters = f"{exported.parameters / 1e6:.1f} M" if exported and exported.parameters else ""
    quality_result = record.find("eval_results") or record.find("search_results")
    quality = headline(quality_result) if quality_result else ""
    speed_result = record.find("speed_results")
    speed = headline(speed_result) if speed_result else ""
    return name, record.recipe, state, quality, speed, parameters, disk, age


def _run_state(stages: Sequence[StageStatus]) -> str:
    """Describes the state of a run, such as "failed at prune" or "3 of 5 stages"."""
    for status in INCOMPLETE:
        for stage in stages:
            if stage.status is status:
                return f"{status} at {stage.name}"
    complete = sum(stage.status is Status.COMPLETE for stage in stages)
    return Status.COMPLETE if complete == len(stages) else f"{complete} of {len(stages)} stages"


def _age(path: Path) -> str:
    """Returns the time since a run was last planned or completed a stage, as text."""
    newest = max(file.stat().st_mtime for file in (path / RUN_FILE, *path.glob(f"*/{MANIFEST}")))
    age = time.time() - newest
    for unit, unit_seconds in AGE_UNITS:
        if age >= unit_seconds:
            return f"{age // unit_seconds:.0f} {unit}"
    return "now"


def _clean(names: Sequence[str], confirmed: bool, console: Console) -> None:
    """Lists runs and, if ``confirmed``, deletes them, except for stages that other runs need.

    Considers other runs in ``ROOT`` and in the parent folders of the named runs. Refuses active
    runs, and names of neither a run nor a sweep.
    """
    chosen_runs = _runs_to_clean(names)
    for path in chosen_runs:
        if lock.read_holder(path) or active_jobs(path):
            fix = f"python launch/run.py cancel run_dir={path}"
            raise RecipeError(f"{path} is being run.", fix)
    roots = {ROOT.resolve(), *(path.parent for path in chosen_runs)}
    other_runs = {run.resolve() for root in roots for run in runs_below(root)} - set(chosen_runs)
    needed_by = {folder: run for run in other_runs for folder in _needed_folders(run)}
    # The table has a row for each stage that stays, then a row for each folder to delete.
    notes = {
        folder: f"needed by {run}"
        for folder, run in needed_by.items()
        if folder.parent in chosen_runs
    }
    deletable = [folder for run in chosen_runs for folder in _deletable(run, needed_by)]
    notes |= dict.fromkeys(deletable, "deleted" if confirmed else "")
    table = plain_table("clean", "folder", "disk", "")
    for folder, note in notes.items():
        table.add_row(str(folder), f"{folder_bytes(folder) / 1e9:.2f} GB", note)
    console.print(table)
    if not confirmed:
        console.print(f"nothing was deleted; {YES} deletes the folders that no run needs")
        return
    with ExitStack() as locks:
        for path in chosen_runs:
            locks.enter_context(lock.acquire(path))
        for folder in deletable:
            _delete(folder)


def _runs_to_clean(names: Sequence[str]) -> list[Path]:
    """Returns the runs with these names, and all runs of the sweeps with these names.

    A name is a path, or a run or sweep in ``ROOT``. Refuses folders that contain runs, such as
    ``runs``, and the empty name, which a script's unset variable gives.
    """
    if not names:
        raise RecipeError(
            "runs clean needs the names of runs.",
            f"runs clean RUN1 RUN2, with names from the list of runs; {YES} deletes them",
        )
    paths = [ROOT / name if (ROOT / name).is_dir() else Path(name) for name in names]
    # ``runs``, the current directory, and all parents of both.
    protected = {
        path.resolve() for root in (ROOT, Path()) for path in (root, *root.absolute().parents)
    }
    for name, path in zip(names, paths, strict=True):
        is_run_or_sweep = (path / RUN_FILE).is_file() or (path / SWEEP_FILE).is_file()
        is_other_folder = path.is_dir() and not is_run_or_sweep  # ``find_runs`` refuses other paths
        if not name or path.resolve() in protected or is_other_folder:
            raise RecipeError(
                f"'{name}' is neither a run nor a sweep.",
                "name runs as the command runs lists them",
            )
    return find_runs(paths)


def _delete(folder: Path) -> None:
    """Deletes a run or a stage; manifests first, so that after a kill no stage looks complete."""
    for manifest in (*folder.glob(MANIFEST), *folder.glob(f"*/{MANIFEST}")):
        manifest.unlink()
    shutil.rmtree(folder)


def _deletable(run: Path, needed: Collection[Path]) -> list[Path]:
    """Returns the whole run if no stage is ``needed``; otherwise each stage that is not needed."""
    # Stages that stay need the run's code, so the code is deleted only with the whole run.
    stages = [path for path in sorted(run.iterdir()) if path.is_dir() and path.name != CODE]
    unneeded = [stage for stage in stages if stage not in needed]
    return unneeded if len(unneeded) < len(stages) else [run]


def _needed_folders(run: Path) -> Iterator[Path]:
    """Yields the run, its stages' inputs, models and text, and all parent folders of these paths.

    If a model or text is inside a stage of another run, this stage is one of the parents.
    """
    for file in run.glob(f"*/{REQUEST}"):
        request = read_yaml(file)  # ``read_request`` would refuse files of other versions
        model_and_text = (request["config"].get(name) for name in ("hf_path", "prefix"))
        paths = [run, *(ref["directory"] for ref in request["inputs"].values())]
        paths += filter(None, model_and_text)  # not every stage has these settings
        for path in paths:
            resolved = Path(path).resolve()
            yield from (resolved, *resolved.parents)


RUN_COMMANDS: Mapping[str, tuple[Callable[[Options, Console], None], tuple[str, ...]]] = {
    "status": (status, ("run_dir", "recipe")),
    "cancel": (cancel, ("run_dir", "recipe")),
    "logs": (logs, ("run_dir", "recipe", "stage", "lines")),
}
"""Commands about a run or sweep, by name: the function, and the names of the options."""
OTHER_COMMANDS: Mapping[str, Callable[[Sequence[str], Console], int]] = {
    "compare": compare,
    "doctor": doctor.run,
    "runs": runs,
}
"""Commands that parse their own arguments and return the exit status."""


def run(arguments: Sequence[str], console: Console) -> int | None:
    """Runs a command and returns the exit status; ``None`` if the arguments are not a command."""
    name = arguments[0] if arguments else ""
    if name in OTHER_COMMANDS:
        return OTHER_COMMANDS[name](arguments[1:], console)
    if name not in RUN_COMMANDS:
        return None
    command, option_names = RUN_COMMANDS[name]
    options = {}
    for arg in arguments[1:]:
        key, equals, value = arg.partition("=")
        if not equals or key not in option_names:
            raise RecipeError(
                f"{name} does not know '{arg}'.{did_you_mean(key, option_names)}",
                f"it takes {', '.join(f'{option}=…' for option in option_names)}",
            )
        options[key] = value
    command(options, console)
    return 0


def _directory(options: Options) -> Path:
    """Returns the directory of the run or sweep that ``run_dir`` or ``recipe`` names."""
    if directory := options.get("run_dir"):
        return Path(os.path.expanduser(directory))
    if recipe := options.get("recipe"):
        return ROOT / recipe
    raise RecipeError("no run is given.", "add run_dir=DIR, or recipe=NAME for runs/NAME")
