"""Runs a recipe: ``python launch/run.py recipe=llama_width_prune``."""

from __future__ import annotations

import gc
import importlib.util
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path


def on_interrupt(handler: Callable[..., object]) -> None:
    """Sets the handler of SIGINT (Ctrl-C) and SIGTERM, unless the calling shell ignores them."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signal_number) is not signal.SIG_IGN:
            signal.signal(signal_number, handler)


def exit_now(*_: object) -> None:
    """Exits without an exception, which an import could swallow or show as a traceback."""
    os.write(1, b"interrupted\n")
    os._exit(130)  # 128 + SIGINT: the usual exit status after Ctrl-C


if __name__ == "__main__":
    on_interrupt(exit_now)  # during the imports below; ``cli`` sets another handler
# `python launch/run.py` puts launch/ on the path, but the packages are in its parent.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
# Commands start faster if garbage is collected after 50,000 new objects instead of 700, and if
# Hydra fails to import the slow plugin of multistorageclient: None makes the import fail.
gc.set_threshold(50_000)
sys.modules["multistorageclient.contrib.hydra"] = None  # type: ignore[assignment]

if importlib.util.find_spec("hydra") is None:
    sys.exit(
        f"error: the recipes' dependencies are not installed for {sys.executable}.\n"
        "  fix: source .venv/bin/activate; if that does not exist, make install creates it"
    )

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from launch import commands, lock, schema
from launch import console as view
from launch.accept import record_acceptance, record_resumed
from launch.executors import executor_of
from launch.hydra_errors import explain
from launch.machine import has_own_python
from launch.plan import Plan, make_plan
from launch.planned import SKIP, PlannedStage
from launch.progress import Follower, run_estimate
from launch.publish import publish, require_publishable, show_files
from launch.rehearse import rehearse
from launch.settings import RunSettings, settings_of
from launch.sweep import (
    is_sweep,
    remove_unused_folder,
    require_new_results,
    require_separate_results,
    resuming_argument,
)
from recipes.core.errors import RecipeError
from recipes.core.files import PARTIAL, explain_storage_errors, remove_partial, storage_problem
from recipes.core.run_state import (
    REQUEST,
    RUN_FILE,
    LastPlan,
    StageState,
    discard_work,
    read_last_plan,
    remove_unused_snapshots,
    stage_states,
)
from recipes.core.screen import screen
from recipes.core.snapshot import CODE, is_snapshot, write_snapshot
from recipes.core.trackers import require_tracker, write_tracker
from recipes.planning.rules import refuse_errors

console = screen()


@hydra.main(version_base="1.3", config_path=str(schema.CONF), config_name="config")
def main(cfg: DictConfig) -> Path | RecipeError | None:
    """Runs one config; in a sweep, Hydra passes the returned value to the callback ``sweep.Best``.

    Returns:
        The return value of ``run``. If ``run`` fails, a sweep gets the error as the value. Outside
        a sweep, the process exits.
    """
    recipe = HydraConfig.get().runtime.choices.get("recipe")
    if recipe is None:
        view.print_recipes(schema.recipes(), console)
        raise SystemExit(1)
    # Errors are printed here. Hydra would print the overrides, too.
    if is_sweep():
        try:
            require_separate_results(cfg, sys.argv[1:])
        except RecipeError as error:
            remove_unused_folder()
            raise SystemExit(_fail(error)) from error  # ends the sweep before its first run
    try:
        return run(cfg, recipe)
    except RecipeError as error:
        status = _fail(error)
        if is_sweep():
            return error  # the other runs are still started
        raise SystemExit(status) from error


def run(cfg: DictConfig, recipe: str) -> Path | None:
    """Plans and runs a config; returns its directory, or ``None`` for a dry run or a rehearsal."""
    start_time = time.monotonic()
    settings = settings_of(cfg)
    run_dir = _run_dir(settings, recipe)
    if is_sweep():
        require_new_results(run_dir, settings.hub.push)
    executor, cluster = executor_of(cfg.cluster)
    if settings.rehearse is not False:
        rehearse(cfg, settings, run_dir, console)
        return None
    last_plan = _last_plan(run_dir, recipe)
    state = _read_state(run_dir)
    require_tracker(settings.tracker, has_own_python(cfg.cluster))
    plan = executor.prepare(make_plan(cfg, settings, run_dir), cluster)
    notes = refuse_errors(executor.problems(plan, cluster), settings.skip_rules)
    plan = replace(plan, notes=plan.notes + notes)
    view.print_plan(plan, console)
    view.print_sources(plan, console)
    view.print_notes(plan, set(settings.skip_rules), console)
    complete = all(stage.action == SKIP for stage in plan.stages)
    require_publishable(plan, settings, waits_for_stages=complete or cluster.follow)
    with _write_plan(plan, last_plan, state, settings.dry_run) as record_stage:
        if record_stage is not None:
            executor.write_scripts(plan, cluster)
            write_tracker(run_dir, recipe, settings.tracker)
            if settings.dry_run:
                executor.dry_run(plan, console)
            else:
                follow = partial(_follow, record_stage, plan)
                complete = executor.start(plan, cluster, follow, console)  # whether it waited
    if settings.dry_run:
        console.print(f"dry run: configs and scripts are in {run_dir}; nothing was started")
        show_files(plan, settings.hub, console)
        return None
    if complete:
        view.print_tables(plan, console)
        view.print_summary(plan, time.monotonic() - start_time, console)
        view.require_gates(plan, console)
        publish(plan, settings.hub, console)
    return run_dir


@contextmanager
def _follow(record_stage: lock.SetStage, plan: Plan, stage: PlannedStage) -> Iterator[Follower]:
    """Shows a stage's progress, and records that the stage runs."""
    record_stage(stage.name)
    with Follower(stage, console, run_estimate(plan, stage)) as follower:
        yield follower


def _run_dir(settings: RunSettings, recipe: str) -> Path:
    """Returns the absolute path of the run's directory; refuses a file and a path with a colon."""
    default = os.path.join("runs", recipe)
    if is_sweep():
        sweep = HydraConfig.get().sweep
        default = os.path.join(sweep.dir, sweep.subdir)
    directory = default if settings.run_dir is None else settings.run_dir
    path = Path(os.path.expanduser(directory)).resolve()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        raise RecipeError(f"run_dir={path}: {existing} is a file.", "set run_dir to a directory")
    if os.pathsep in str(path):  # PYTHONPATH of a stage has a folder of the run: its code snapshot
        raise RecipeError(
            f"run_dir={path} has a colon, which separates the paths of PYTHONPATH.",
            "set run_dir to a directory without colons in its path",
        )
    return path


def _last_plan(run_dir: Path, recipe: str) -> LastPlan:
    """Returns the last plan of a run; a plan without stages for a new run.

    Refuses a run of another recipe, and a directory that has files of the user but no plan.
    """
    last_plan = read_last_plan(run_dir)
    if last_plan is None:
        if not all(map(_is_from_killed_launch, run_dir.glob("*"))):
            raise RecipeError(
                f"run_dir={run_dir} is not empty and is not a run directory.",
                "choose a new directory",
            )
        return LastPlan(recipe, {})
    if last_plan.recipe != recipe:
        raise RecipeError(
            f"{run_dir} is a run of recipe {last_plan.recipe}, not of {recipe}.",
            "choose another run_dir, or delete this directory",
        )
    return last_plan


def _is_from_killed_launch(path: Path) -> bool:
    """Returns whether a path may be from a launcher that was killed before it wrote ``run.yaml``.

    Before ``run.yaml``, a launcher writes only the lock, a code snapshot and the stages' requests.
    """
    if not path.is_dir():
        return path.name == lock.LOCK or path.match(PARTIAL)
    if path.name == CODE:
        return all(map(is_snapshot, path.glob("*")))
    request = path / REQUEST  # its first key is ``format``
    has_request = request.is_file() and request.read_bytes().startswith(b"format: ")
    return has_request or all(file.match(PARTIAL) for file in path.glob("*"))


RunState = tuple[int | None, dict[str, StageState]]
"""The modification time of ``run.yaml`` in nanoseconds (``None`` without the file), and the state
of each stage by name. A launcher writes ``run.yaml`` before it starts stages."""


def _read_state(run_dir: Path) -> RunState:
    file = run_dir / RUN_FILE
    return file.stat().st_mtime_ns if file.exists() else None, stage_states(run_dir)


def _require_state(plan: Plan, state: RunState) -> None:
    """Refuses a plan if the run has changed since ``state`` was read, just before planning.

    Compares only stages that the plan starts, because Slurm jobs can change other stages meanwhile.
    """
    (time_before, states_before), (time_now, states_now) = state, _read_state(plan.run_dir)
    names = [stage.name for stage in plan.todo()]
    is_changed = any(states_now.get(name) != states_before.get(name) for name in names)
    if is_changed or time_now != time_before:
        raise RecipeError(
            f"{plan.run_dir} changed while this command was planning.", "repeat the command"
        )


@contextmanager
def _write_plan(
    plan: Plan, last_plan: LastPlan, state: RunState, dry_run: bool
) -> Iterator[lock.SetStage | None]:
    """Locks a run's directory and writes a plan to it; the ``with`` block runs under the lock.

    Also deletes leftover work of complete stages. Without anything to write or delete, there is no
    lock. A dry run changes no acceptances and no work. ``state`` is from before planning.

    Yields:
        A function that records the running stage in the lock; ``None`` if no stage must run.

    Raises:
        RecipeError: The run's state differs from ``state``, so the plan is out of date.
    """
    # Stages that ``only`` excludes keep the fingerprints that they have in the last plan.
    fingerprints = {**last_plan.stages, **{s.name: s.fingerprint for s in plan.stages}}
    stages = {name: fingerprints.get(name) for name in plan.chain.stages}
    # A dry run replaces no results, so the last plan's list of results to replace stays.
    to_replace = last_plan.replaces if dry_run else plan.replaces
    new_plan = LastPlan(last_plan.recipe, stages, replaces=to_replace)
    skipped_states = [s.state() for s in plan.stages if s.action == SKIP and not dry_run]
    leftover_dirs = [state.directory for state in skipped_states if state.leftover]
    must_run = any(stage.action != SKIP for stage in plan.stages)
    stages_to_start = [] if dry_run else list(plan.todo())
    acceptances = {} if dry_run else plan.acceptances
    if not (must_run or leftover_dirs or acceptances) and new_plan == last_plan:
        yield None
        return
    with explain_storage_errors(plan.run_dir):
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        with lock.acquire(plan.run_dir) as set_stage:
            _require_state(plan, state)
            if must_run:
                write_snapshot(plan.run_dir)
            _write_requests(plan, last_plan)
            for stage in stages_to_start:
                record_resumed(stage)
            for folder, acceptance in acceptances.items():
                record_acceptance(folder, acceptance)
            new_plan.write(plan.run_dir)
            if not dry_run:
                for folder in leftover_dirs:
                    discard_work(folder)
                for folder in (plan.run_dir, *(stage.directory for stage in plan.todo())):
                    remove_partial(folder)
            try:
                yield set_stage if must_run else None
            finally:
                remove_unused_snapshots(plan.run_dir)


def _write_requests(plan: Plan, last_plan: LastPlan) -> None:
    """Writes ``config.yaml`` of each stage that will run or whose fingerprint changed."""
    for stage in plan.stages:
        is_changed = last_plan.stages.get(stage.name) != stage.fingerprint
        # An accepted result keeps the ``config.yaml`` from which it was computed.
        if stage in plan.todo() or (is_changed and not stage.accepted):
            stage.request().write(stage.directory)


def cli() -> int:
    """Runs the command line and returns the exit status; prints expected errors."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them
    arguments = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows "?" instead of "…"
    try:
        on_interrupt(signal.default_int_handler)  # raises KeyboardInterrupt, which stops the stages
        return _run_arguments(arguments)
    except KeyboardInterrupt:
        argument = resuming_argument(arguments)
        addition = f" with {argument}" if argument else ""
        console.print(f"interrupted; the same command{addition} resumes", markup=False)
        return 130  # as in ``exit_now``
    except (HydraException, OmegaConfBaseException, YAMLError, RecipeError) as error:
        return _fail(error)
    except (FileExistsError, NotADirectoryError) as error:
        return _fail(RecipeError(f"{error.filename} is a file.", "choose another directory"))
    except OSError as error:
        if (problem := storage_problem(error, Path())) is None:
            raise
        return _fail(problem)


def _run_arguments(arguments: list[str]) -> int:
    """Runs the command, or the recipe, of a command line and returns the exit status."""
    try:
        Path.cwd()  # Hydra reads it
    except FileNotFoundError as error:
        raise RecipeError("the working directory was deleted.", "cd to another one") from error
    if {"-h", "--help"} & set(arguments):
        console.print(schema.help_text(), markup=False, soft_wrap=True)
    elif (status := commands.run(arguments, console)) is not None:
        return status  # the arguments were a command, such as ``status``
    elif any(arg.startswith("-") for arg in arguments):
        sys.argv[1:] = schema.hydra_arguments(arguments)
        schema.register()
        main()  # with Hydra's flags, such as -m and --cfg
    else:
        main(schema.compose(*arguments))  # faster: Hydra's main composes twice
    return 0


def _fail(error: Exception) -> int:
    """Prints an error and returns the exit status."""
    screen(stderr=True).print(f"error: {explain(error)}", markup=False)
    return 1


if __name__ == "__main__":
    sys.exit(cli())
