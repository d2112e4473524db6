"""Runs stages on this machine, in the launcher's own environment."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console

from launch.cluster import Cluster, Executor, Follow
from launch.executors import foreground
from launch.plan import Plan
from launch.planned import PlannedStage
from recipes.core.preloaded import followed, fork_stage, preloaded
from recipes.core.run_state import REQUEST

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


def shared_environment(plan: Plan, cluster: LocalConfig) -> dict[str, str] | None:
    """All variables of most stages that one process can preload for; ``None`` below two stages.

    Many are read only when a process starts or imports, so a stage with others starts by itself.
    """
    every = [_all_variables(stage, cluster) for stage in plan.todo() if _may_fork(stage)]
    shared = max(every, key=every.count, default={})
    return shared if every.count(shared) > 1 else None


def _may_fork(stage: PlannedStage) -> bool:
    return stage.stage.needs_torch and stage.config.resources.devices == 1


def _all_variables(stage: PlannedStage, cluster: LocalConfig) -> dict[str, str]:
    return {**os.environ, **environment(stage, cluster)}


def start(plan: Plan, cluster: LocalConfig, follow: Follow, console: Console) -> bool:
    """Runs the stages to their end; those that can, share one import of the stack."""
    shared = shared_environment(plan, cluster)
    if shared is None:
        return foreground.run_all(plan, follow)
    with preloaded(PRELOADED, shared, plan.run_dir / "preload.log") as server:

        def begin(
            stage: PlannedStage, log: IO[bytes]
        ) -> AbstractContextManager[Callable[[], bool]]:
            process = None
            if _may_fork(stage) and _all_variables(stage, cluster) == shared:
                process = fork_stage(server, stage.module, stage.directory / REQUEST, log)
            if process is None:
                return foreground.by_script(stage, log)
            return followed(server, process, log)

        return foreground.run_all(plan, follow, begin)


EXECUTOR = Executor(config=LocalConfig, prepare=prepare, write_scripts=write_scripts, start=start)
