"""Runs a recipe: ``python launch/run.py recipe=llama_width_prune``."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# `python launch/run.py` puts only launch/ on the path; the repository is what holds the packages.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from launch import console as view
from launch import schema
from launch.compare import compare
from launch.executors import local
from launch.explain import explain
from launch.plan import Plan, make_plan
from launch.tracking import open_tracker, require_tracker, tracked_run
from recipes.errors import RecipeError
from recipes.manifest import write_text_atomically

RUN_FILE = "run.yaml"
console = Console(highlight=False, soft_wrap=True)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Composes, plans, runs."""
    recipe = HydraConfig.get().runtime.choices.get("recipe")
    if recipe is None:
        view.print_recipes(schema.recipes(), console)
        raise SystemExit(1)
    try:
        run(cfg, recipe)
    except RecipeError as error:  # past Hydra, which would print the overrides first
        raise SystemExit(_fail(error)) from error


def run(cfg: DictConfig, recipe: str) -> None:
    """Plans and runs a composed config.

    Raises:
        RecipeError: Anything that the user can fix.
    """
    began = time.monotonic()
    run_dir = _run_dir(cfg, recipe)
    _require_same_recipe(run_dir, recipe)
    if cfg.cluster.executor != "local":
        raise RecipeError(f"cluster.executor={cfg.cluster.executor} is not known.", "cluster=local")
    require_tracker(cfg.tracker.name)
    plan = make_plan(cfg, run_dir)
    local.check(plan.todo())
    view.print_plan(plan, console)
    if plan.todo():
        run_dir.mkdir(parents=True, exist_ok=True)
        with _lock(run_dir):
            _start(plan, cfg, recipe)
    if not cfg.dry_run:
        view.print_summary(plan, time.monotonic() - began, console)


def _start(plan: Plan, cfg: DictConfig, recipe: str) -> None:
    """Writes the requests of all stages, then runs them unless this is a dry run."""
    env = {str(k): str(v) for k, v in cfg.cluster.env.items()}
    _write_requests(plan, env, recipe)
    if cfg.dry_run:
        console.print(f"dry run: configs and scripts are in {plan.run_dir}; nothing was started")
        return
    with open_tracker(tracked_run(cfg, plan.run_dir, recipe)) as tracker:
        for stage in plan.todo():
            with view.Follower(stage, console, tracker.stage(stage.name)) as follower:
                local.run(stage, env, follower)
            tracker.finish(stage.name, stage.directory)


def _run_dir(cfg: DictConfig, recipe: str) -> Path:
    if cfg.run_dir is not None:
        path = Path(str(cfg.run_dir)).resolve()
        if path.exists() and not path.is_dir():
            raise RecipeError(f"run_dir={path} is a file.", "give a directory")
        return path
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode == RunMode.MULTIRUN:
        return Path(hydra_cfg.sweep.dir, hydra_cfg.sweep.subdir).resolve()
    return Path("runs", recipe).resolve()


def _require_same_recipe(run_dir: Path, recipe: str) -> None:
    file = run_dir / RUN_FILE
    if file.exists() and (other := OmegaConf.load(file).recipe) != recipe:  # type: ignore[union-attr]
        raise RecipeError(
            f"{run_dir} is a run of recipe {other}, not of {recipe}.",
            "choose another run_dir, or delete that one",
        )


def _write_requests(plan: Plan, env: dict[str, str], recipe: str) -> None:
    """Writes what the stages will be started with; this is all that a dry run does."""
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomically(plan.run_dir / RUN_FILE, OmegaConf.to_yaml({"recipe": recipe}))
    for stage in plan.todo():
        stage.directory.mkdir(exist_ok=True)
        text = OmegaConf.to_yaml(stage.request())
        write_text_atomically(stage.directory / "config.yaml", text)
        local.write_script(stage, env)


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """Keeps two launchers from writing one run; the kernel frees it however the holder dies."""
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(
                f"another process is running {run_dir}.", "wait for it, or choose another run_dir"
            ) from error
        yield


def cli() -> int:
    """Runs ``main`` and turns every expected failure into one message and an exit status."""
    if sys.argv[1:2] == ["compare"]:
        return _compare(sys.argv[2:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the message is ours
    # Hydra's parser stops at overrides on both sides of a flag: `recipe=R -m x=1,2`.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    schema.register()
    try:
        main()
    except KeyboardInterrupt:
        console.print("interrupted; the same command resumes")
        return 130
    except (HydraException, OmegaConfBaseException) as error:
        return _fail(error)
    return 0


def _compare(words: list[str]) -> int:
    try:
        console.print(compare(words))
    except RecipeError as error:
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    console_of_errors = Console(stderr=True, highlight=False, soft_wrap=True)
    console_of_errors.print(f"error: {explain(error)}", markup=False)
    return 1


if __name__ == "__main__":
    sys.exit(cli())
