"""Runs stages on this machine, in the launcher's own environment."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from typing import IO

from rich.console import Console

from launch.cluster import Cluster, Executor, Follow
from launch.executors import foreground
from launch.plan import Plan
from launch.planned import PlannedStage
from recipes.core.fingerprint import WORKER
from recipes.core.fork_server import fork_module, fork_server, watch_child
from recipes.core.run_state import REQUEST
from recipes.core.stage_process import RunningStage

PRELOADED = (
    "nemo_convert.convert",
    "nemo_convert.parity",
    "recipes.distillation.trainer",
    "recipes.evaluation.text_quality",
    "recipes.pruning.cut_checkpoint",
    "recipes.pruning.scoring",
    "recipes.stages.contract",
)
"""What the stages that need torch import, and with it torch, transformers, NeMo and ModelOpt."""


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


def environment(stage: PlannedStage, cluster: LocalConfig) -> dict[str, str]:
    """Variables that the stage gets besides the caller's own."""
    env = foreground.environment(stage, cluster)
    path = filter(None, [env["PYTHONPATH"], os.environ.get("PYTHONPATH")])
    return {**env, "PYTHONPATH": os.pathsep.join(path)}


def write_scripts(plan: Plan, cluster: LocalConfig) -> None:
    """Writes a ``run.sh`` for every stage that is to run."""
    for stage in plan.todo():
        command = shlex.join(foreground.command(stage, sys.executable))
        foreground.write_script(stage, command, environment(stage, cluster))


def may_fork(stage: PlannedStage) -> bool:
    """Whether the fork server can start the stage.

    Variables of its own are read when a process starts or imports, and so need another process.
    """
    resources = stage.config.resources
    return stage.stage.needs_torch and resources.devices == 1 and not resources.env


def start(plan: Plan, cluster: LocalConfig, follow: Follow, console: Console) -> bool:
    """Runs the stages to their end; stages that can be forked share one import of the stack."""
    forkable = [stage for stage in plan.todo() if may_fork(stage)]
    if len(forkable) < 2:
        return foreground.run_all(plan, follow)
    shared = {**os.environ, **environment(forkable[0], cluster)}
    with fork_server(PRELOADED, shared, plan.run_dir / "fork_server.log") as server:

        def start_stage(stage: PlannedStage, log: IO[bytes]) -> RunningStage:
            pidfd = None
            if may_fork(stage):
                arguments = [stage.module, str(stage.directory / REQUEST)]
                pidfd = fork_module(server, WORKER, arguments, log)
            if pidfd is None:
                return foreground.start_script(stage, log)
            return watch_child(server, pidfd, log)

        return foreground.run_all(plan, follow, start_stage)


EXECUTOR = Executor(config=LocalConfig, prepare=prepare, write_scripts=write_scripts, start=start)
