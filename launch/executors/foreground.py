"""Runs stages on this machine, one after the other, each by its ``run.sh`` if not faster."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from typing import IO

from launch.cluster import Cluster, Follow, layout_variables
from launch.console import Follower
from launch.executors.slurm_queue import active_jobs
from launch.plan import Plan
from launch.planned import PlannedStage
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT, write_text_atomically
from recipes.core.processes import cores
from recipes.core.run_state import REQUEST
from recipes.core.stage_process import RunningStage, run_to_end, start_command, start_process

SCRIPT = "run.sh"

Start = Callable[[PlannedStage, IO[bytes]], RunningStage]
"""Starts a stage whose output goes to a log."""


def require_one_machine(plan: Plan, cluster: Cluster) -> None:
    """Refuses stages of several nodes, and a run that has jobs in Slurm's queue."""
    for name, (job, state) in active_jobs(plan.run_dir).items():
        raise RecipeError(
            f"job {job.id} is {state.state.lower()} for {name} of this run.",
            f"wait for it, or: python launch/run.py cancel run_dir={plan.run_dir}",
        )
    for stage in plan.todo():
        if stage.config.resources.nodes != 1:
            raise RecipeError(
                f"stages.{stage.name}.resources.nodes={stage.config.resources.nodes}, but "
                f"cluster={cluster.executor} is one machine.",
                "set it to 1, or use cluster=slurm",
            )


def command(stage: PlannedStage, python: str) -> list[str]:
    """A stage's command line on one machine."""
    devices = stage.config.resources.devices
    return start_command(stage.module, stage.directory / REQUEST, devices, python)


def environment(stage: PlannedStage, cluster: Cluster) -> dict[str, str]:
    """Variables that the stage gets besides those of the machine."""
    devices = stage.config.resources.devices
    threads = max(1, cores() // devices)
    # Where a job of several ranks starts the launcher, a stage must not take itself for one.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} if devices == 1 else {}
    return {
        "PYTHONPATH": str(REPO_ROOT),
        "OMP_NUM_THREADS": str(threads),
        **alone,
        **layout_variables(stage),
        **cluster.env,
        **stage.config.resources.env,
    }


def write_script(
    stage: PlannedStage, command: str, exports: Mapping[str, str], setup: str = ""
) -> None:
    """Writes ``run.sh``, which starts the stage for the launcher, or by hand."""
    lines = ["#!/usr/bin/env bash"]
    lines += ["# shellcheck disable=SC2016 # what stands in single quotes is meant literally"]
    lines += ["set -euo pipefail"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    lines += [f"cd {shlex.quote(os.getcwd())}", setup, f"exec {command}"]
    path = stage.directory / SCRIPT
    write_text_atomically(path, "\n".join(filter(None, lines)) + "\n")
    path.chmod(0o755)


def start_script(stage: PlannedStage, log: IO[bytes]) -> RunningStage:
    """Starts a stage by its script."""
    return start_process([stage.directory / SCRIPT], log)


def run_all(plan: Plan, follow: Follow, start: Start = start_script) -> bool:
    """Runs what is to do, in order; the first failure ends it."""
    for stage in plan.todo():
        with follow(stage) as follower:
            run(stage, follower, start)
    return True


def run(stage: PlannedStage, follower: Follower, start: Start = start_script) -> None:
    """Runs one stage to its end; refuses one that leaves no new result."""
    run_to_end(
        stage.name,
        stage.directory,
        stage.fingerprint,
        lambda log: start(stage, log),
        follower.update,
    )
