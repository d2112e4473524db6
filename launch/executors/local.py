"""Runs stages on this machine, one after the other, in the launcher's environment."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO

from rich.console import Console

from launch.cluster import Cluster, Follow, stage_variables
from launch.plan import Plan
from launch.planned import PlannedStage
from launch.progress import Follower
from launch.slurm_queue import active_jobs, forget_job
from recipes.core.errors import RecipeError
from recipes.core.files import write_text_atomically
from recipes.core.fingerprint import WORKER
from recipes.core.fork_server import fork_module, fork_server, watch_child
from recipes.core.processes import cores
from recipes.core.run_state import REQUEST
from recipes.core.stage_process import (
    SINGLE_RANK,
    RunningStage,
    run_to_end,
    start_command,
    start_process,
)
from recipes.planning import rules
from recipes.planning.hardware import counted_gpus, physical_memory
from recipes.planning.rules import Problem
from recipes.planning.training_cost import gathering_bytes

SCRIPT = "run.sh"
PRELOADED = (
    "nemo_convert.convert",
    "nemo_convert.parity",
    "recipes.distillation.trainer",
    "recipes.evaluation.text_quality",
    "recipes.pruning.pruned_checkpoint",
    "recipes.pruning.scoring",
    "recipes.stages.contract",
)
"""Modules that the fork server imports once for all stages.

Their import takes long, because they import torch, NeMo and ModelOpt.
"""
Start = Callable[[PlannedStage, IO[bytes]], RunningStage]
"""A function that starts a stage, whose output goes to the file."""


@dataclass
class LocalConfig(Cluster):
    """Settings of ``cluster=local``."""

    executor: str = "local"


CONFIG = LocalConfig


def prepare(plan: Plan, cluster: LocalConfig) -> Plan:
    """Raises ``RecipeError`` for stages on several nodes, or that lack a library here."""
    require_one_machine(plan, cluster)
    for stage in plan.todo():
        stage.definition.check_machine(stage.config)
    return plan


def problems(plan: Plan, cluster: Cluster) -> Iterator[Problem]:
    """Compares GPUs and host memory of this machine with what stages on GPUs need."""
    gpus, memory = counted_gpus(), physical_memory()
    for stage in plan.todo():
        if not stage.uses_gpu:
            continue
        if 0 < gpus < stage.devices:
            yield Problem(
                rules.GPUS,
                f"{stage.name} needs {stage.devices} GPUs, but this machine has {gpus}",
                f"set stages.{stage.name}.resources.devices={gpus}, with parallel sizes that fit, "
                "or use cluster=slurm",
            )
        if (workload := stage.workload) is None:
            continue
        layout = workload.layout
        if (needed := layout.devices * gathering_bytes(workload)) > memory:
            yield Problem(
                rules.HOST_MEMORY,
                f"{stage.name} takes {needed / 1e9:.0f} GB of host memory to save a checkpoint, "
                f"but this machine has {memory / 1e9:.0f} GB",
                "split the model over more ranks, such as "
                f"stages.{stage.name}.tensor_model_parallel_size={2 * layout.tensor}",
            )


def dry_run(plan: Plan, console: Console) -> None:
    """Prints nothing, because there is no scheduler."""


def require_one_machine(plan: Plan, cluster: Cluster) -> None:
    """Raises ``RecipeError`` for stages on several nodes, and for a run with active Slurm jobs."""
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
    """Returns a stage's command line on one machine; ``python`` is the interpreter."""
    devices = stage.config.resources.devices
    return start_command(stage.module, stage.directory / REQUEST, devices, python)


def environment(stage: PlannedStage, cluster: Cluster) -> dict[str, str]:
    """Returns the environment variables that a stage gets in addition to those of the launcher."""
    devices = stage.config.resources.devices
    return {
        # The ranks share the machine's cores.
        "OMP_NUM_THREADS": str(max(1, cores() // stage.devices)),
        **(SINGLE_RANK if devices == 1 else {}),
        **stage_variables(stage, cluster),
    }


def write_scripts(plan: Plan, cluster: LocalConfig) -> None:
    """Writes ``run.sh`` of every stage that will run."""
    for stage in plan.todo():
        line = shlex.join(command(stage, sys.executable))
        write_script(stage, line, environment(stage, cluster))


def write_script(
    stage: PlannedStage, command: str, exports: Mapping[str, str], setup: str = ""
) -> None:
    """Writes ``run.sh``, with which the launcher or the user starts the stage.

    Args:
        stage: The stage.
        command: The stage's shell command.
        exports: Environment variables to export.
        setup: Shell command to run before ``command``; may be empty.
    """
    lines = ["#!/usr/bin/env bash"]
    lines += ["# shellcheck disable=SC2016 # text in single quotes must not be expanded"]
    lines += ["set -euo pipefail"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    lines += [f"cd {shlex.quote(os.getcwd())}"]
    lines += [setup] if setup else []
    lines += [f"exec {command}"]
    path = stage.directory / SCRIPT
    write_text_atomically(path, "\n".join(lines) + "\n")
    path.chmod(0o755)


def may_fork(stage: PlannedStage) -> bool:
    """Whether the fork server can start the stage.

    These stages need a new process instead:

    - A stage that does not use torch, because it does not need the server's imports.
    - A stage with ``resources.env``, because libraries read variables when they are imported.
    - A resumed stage. It runs the code of an earlier start, but the server has imported new code.
    - A stage on several devices, because torchrun starts it. ``stage.devices`` also counts the
      devices of a search's training runs.
    """
    needs_own_imports = bool(stage.config.resources.env) or stage.resumed is not None
    return stage.definition.needs_torch and stage.devices == 1 and not needs_own_imports


def start(plan: Plan, cluster: LocalConfig, follow: Follow, console: Console) -> bool:
    """Runs the stages in order. Stages that the fork server can start share its imports."""
    forkable = [stage for stage in plan.todo() if may_fork(stage)]
    if len(forkable) < 2:  # with one stage there is no import to share
        return run_all(plan, follow)
    # The variables of forkable stages differ only by ``NEEDS_GPU``, because each stage has one
    # device and no ``resources.env``. If one of the stages needs a GPU, all of them require it.
    first = next((stage for stage in forkable if stage.uses_gpu), forkable[0])
    shared_env = {**os.environ, **environment(first, cluster)}
    with fork_server(PRELOADED, shared_env, plan.run_dir / "fork_server.log") as server:

        def start_stage(stage: PlannedStage, log: IO[bytes]) -> RunningStage:
            pidfd = None
            if may_fork(stage):
                arguments = [stage.module, str(stage.directory / REQUEST)]
                pidfd = fork_module(server, WORKER, arguments, log)
            if pidfd is None:  # not forkable, or the server has ended
                return start_script(stage, log)
            return watch_child(server, pidfd, log)

        return run_all(plan, follow, start_stage)


def start_script(stage: PlannedStage, log: IO[bytes]) -> RunningStage:
    """Starts a stage's ``run.sh``, whose output goes to ``log``."""
    return start_process([stage.directory / SCRIPT], log)


def run_all(plan: Plan, follow: Follow, start_stage: Start = start_script) -> bool:
    """Runs the stages of ``plan.todo()`` in order; raises ``RecipeError`` if one fails.

    Returns:
        Always ``True``, because it waits for the stages. An executor's ``start`` must return this.
    """
    for stage in plan.todo():
        forget_job(plan.run_dir, stage.name)
        with follow(stage) as follower:
            run(stage, follower, start_stage)
    return True


def run(stage: PlannedStage, follower: Follower, start_stage: Start = start_script) -> None:
    """Runs one stage to its end; raises ``RecipeError`` if the stage leaves no new result."""
    start_with_log = partial(start_stage, stage)
    run_to_end(stage.name, stage.directory, stage.fingerprint, start_with_log, follower.update)
