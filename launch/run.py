"""Runs a recipe: ``python launch/run.py recipe=llama_width_prune``."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path


def interrupted_by(handler: Callable[..., object]) -> None:
    """Sets what Ctrl-C and SIGTERM do; what ignores one, such as ``nohup``, goes on doing so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def leave(*_: object) -> None:
    """Ends at once: an exception would show where an import was, or be lost in it."""
    os.write(1, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    interrupted_by(leave)
# `python launch/run.py` puts only launch/ on the path; the repository is what holds the packages.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

if importlib.util.find_spec("hydra") is None:
    sys.exit(
        f"error: {sys.executable} has not what recipes need.\n"
        "  fix: source .venv/bin/activate; make install makes it if it is not there"
    )

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from launch import commands, lock, schema, time_left
from launch import console as view
from launch.command_line import help_text, hydra_words
from launch.executor import executor_of
from launch.hydra_errors import explain
from launch.judge import require_gates
from launch.plan import Plan, make_plan
from launch.planned import PlannedStage
from launch.publish import public_file, publish, require_publishable, show_files
from launch.rehearse import rehearse
from launch.settings import RunSettings, settings_of
from launch.staleness import SKIP
from launch.sweep import require_separate_results
from launch.trackers import Tracker, open_tracker, require_tracker, tracked_run
from recipes.core.errors import RecipeError
from recipes.core.files import explain_storage_errors, remove_partial
from recipes.core.run_state import LastPlan, discard_work, read_last_plan
from recipes.core.screen import screen

console = screen()


@hydra.main(version_base="1.3", config_path=str(schema.CONF), config_name="config")
def main(cfg: DictConfig) -> Path | None:
    """Composes, plans, runs; returns what ``run`` does, which a sweep asks for."""
    recipe = HydraConfig.get().runtime.choices.get("recipe")
    if recipe is None:
        view.print_recipes(schema.recipes(), console)
        raise SystemExit(1)
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            require_separate_results(cfg, sys.argv[1:])
        return run(cfg, recipe)
    except RecipeError as error:  # past Hydra, which would print the overrides first
        raise SystemExit(_fail(error)) from error


def run(cfg: DictConfig, recipe: str) -> Path | None:
    """Plans and runs a composed config; a ``RecipeError`` is what the user can fix.

    Returns the run's directory, if it was more than planned.
    """
    began = time.monotonic()
    settings = settings_of(cfg)
    run_dir = _run_dir(settings, recipe)
    if settings.rehearse is not False:
        rehearse(cfg, settings, run_dir, console)
        return None
    before = _last_plan_of(run_dir, recipe)
    require_tracker(settings.tracker_name)
    executor, cluster = executor_of(cfg.cluster)
    if settings.tracker_name is not None and not executor.follows(cluster):
        raise RecipeError(
            f"tracker={settings.tracker_name} is fed by the launcher, which returns once the jobs "
            "are submitted.",
            "add cluster.follow=true",
        )
    plan = executor.prepare(make_plan(cfg, settings, run_dir), cluster)
    view.print_plan(plan, console)
    view.print_notes(plan, set(settings.skip_rules), console)
    to_do = any(stage.action != SKIP for stage in plan.stages)
    require_publishable(plan, settings, not to_do or executor.follows(cluster))
    ended = not settings.dry_run
    with _recorded(plan, before, settings.dry_run) as holding:
        if holding is not None:
            executor.write_scripts(plan, cluster)
        if holding is not None and not settings.dry_run:
            with open_tracker(tracked_run(cfg, run_dir, recipe)) as tracker:
                follow = partial(_follow, tracker, holding, plan)
                ended = executor.start(plan, cluster, follow, console)
    if settings.dry_run:
        console.print(f"dry run: configs and scripts are in {run_dir}; nothing was started")
        show_files(plan, settings.hub, console)
    elif ended:
        view.print_tables(plan, console)
        view.print_summary(plan, time.monotonic() - began, console)
        require_gates(plan, console)
        publish(plan, settings.hub, console)
    return None if settings.dry_run else run_dir


@contextmanager
def _follow(
    tracker: Tracker, holding: lock.Holding, plan: Plan, stage: PlannedStage
) -> Iterator[view.Follower]:
    """Shows a stage's progress, gives it to the tracker, and says that it is the one that runs."""
    holding.works_on(stage.name)
    left = time_left.of_run(plan, stage)
    with view.Follower(stage, console, tracker.stage(stage.name), left) as follower:
        yield follower
    tracker.finish(stage.name, stage.directory, public_file(stage))


def _run_dir(settings: RunSettings, recipe: str) -> Path:
    if settings.run_dir is not None:
        path = Path(settings.run_dir).resolve()
        if path.exists() and not path.is_dir():
            raise RecipeError(f"run_dir={path} is a file.", "give a directory")
        return path
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode == RunMode.MULTIRUN:
        return Path(hydra_cfg.sweep.dir, hydra_cfg.sweep.subdir).resolve()
    return Path("runs", recipe).resolve()


def _last_plan_of(run_dir: Path, recipe: str) -> LastPlan:
    """Returns how a run was planned last; refuses a run of another recipe."""
    last = read_last_plan(run_dir)
    if last is not None and last.recipe != recipe:
        raise RecipeError(
            f"{run_dir} is a run of recipe {last.recipe}, not of {recipe}.",
            "choose another run_dir, or delete that one",
        )
    return last or LastPlan(recipe, {})


@contextmanager
def _recorded(plan: Plan, before: LastPlan, dry_run: bool) -> Iterator[lock.Holding | None]:
    """Records a plan in its run's directory; yields the lock if any stage is to be started.

    Requests are written of stages that start, or that were planned with other settings since.
    Work of complete stages is deleted: they were killed before they could do so. Nothing is written
    where all is as it was.
    """
    known = dict(before.stages) | {stage.name: stage.fingerprint for stage in plan.stages}
    last = LastPlan(before.recipe, {name: known.get(name) for name in plan.chain.stages})
    complete = [stage.state() for stage in plan.stages if stage.action == SKIP and not dry_run]
    leftovers = [state.directory for state in complete if state.leftover]
    starts = any(stage.action != SKIP for stage in plan.stages)
    if not starts and not leftovers and last == before:
        yield None
        return
    with explain_storage_errors(plan.run_dir):
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        with lock.held(plan.run_dir) as holding:
            for stage in plan.stages:
                if stage in plan.todo() or before.stages.get(stage.name) != stage.fingerprint:
                    stage.request().write(stage.directory)
            last.write(plan.run_dir)
            if not dry_run:
                for folder in leftovers:
                    discard_work(folder)
                for folder in (plan.run_dir, *(stage.directory for stage in plan.todo())):
                    remove_partial(folder)
            yield holding if starts else None


def cli() -> int:
    """Runs ``main`` and turns every expected failure into one message and an exit status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the message is ours
    words = sys.argv[1:]
    try:
        interrupted_by(signal.default_int_handler)  # from now on it stops what was started
        if {"-h", "--help"} & set(words):
            console.print(help_text(), markup=False, soft_wrap=True)
        elif commands.is_command(words):
            return commands.run(words, console)
        elif any(word.startswith("-") for word in words):
            sys.argv[1:] = hydra_words(words)
            schema.register()
            main()  # with Hydra's flags, such as -m and --cfg
        else:
            main(schema.compose(*words))  # which Hydra's main does twice
    except KeyboardInterrupt:
        console.print("interrupted; the same command resumes")
        return 130
    except (HydraException, OmegaConfBaseException, RecipeError) as error:
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    screen(stderr=True).print(f"error: {explain(error)}", markup=False)
    return 1


if __name__ == "__main__":
    sys.exit(cli())
