"""Runs stages on this machine, in the launcher's own environment."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launch.cluster import Cluster, Executor, Follow
from launch.executors import foreground
from launch.plan import Plan
from launch.planned import PlannedStage


@dataclass
class LocalConfig(Cluster):
    """Settings of ``cluster=local``."""

    executor: str = "local"


def prepare(plan: Plan, cluster: LocalConfig) -> Plan:
    """Refuses what needs several machines, or what this one lacks."""
    foreground.require_one_machine(plan, cluster)
    for stage in plan.todo():
        # What only this kind of machine lacks must not come out after hours of training.
        stage.stage.require_here(stage.config)
    return plan


def command(stage: PlannedStage) -> list[str]:
    """The stage's command line."""
    return foreground.command(stage, sys.executable)


def environment(stage: PlannedStage, cluster: LocalConfig) -> dict[str, str]:
    """Variables that the stage gets besides the caller's own."""
    env = foreground.environment(stage, cluster)
    path = filter(None, [env["PYTHONPATH"], os.environ.get("PYTHONPATH")])
    return {**env, "PYTHONPATH": os.pathsep.join(path)}


def write_script(stage: PlannedStage, cluster: LocalConfig) -> Path:
    """Writes ``run.sh``."""
    return foreground.write_script(
        stage, environment(stage, cluster), [], shlex.join(command(stage))
    )


def write_scripts(plan: Plan, cluster: LocalConfig) -> None:
    """Writes a ``run.sh`` for every stage that is to run."""
    for stage in plan.todo():
        write_script(stage, cluster)


def start(plan: Plan, cluster: LocalConfig, follow: Follow, console: Console) -> bool:
    """Runs the stages to their end."""
    return foreground.run_all(plan, follow)


EXECUTOR = Executor(config=LocalConfig, prepare=prepare, write_scripts=write_scripts, start=start)
