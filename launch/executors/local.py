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
"""Modules that the fork server imports once for all stages. They import torch, NeMo and ModelOpt,
which takes long."""
Start = Callable[[PlannedStage, IO[bytes]], RunningStage]
"""A function that starts a stage, and writes the stage's output to the file."""


@dataclass
class LocalConfig(Cluster):
    """Settings of ``cluster=local``."""

    executor: str = "local"


CONFIG = LocalConfig


def prepare(plan: Plan, cluster: LocalConfig) -> Plan:
    """Raises ``RecipeError`` if this machine alone cannot run the plan, or lacks a library."""
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
        if 0 < gpus < stage.devices:  # 0: the number of GPUs is unknown
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
    for name, (job, state) in active_jobs(plan.run_dir).items():  # names the first job
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
    """Returns the command line that runs a stage on one machine with the interpreter ``python``."""
    devices = stage.config.resources.devices
    return start_command(stage.module, stage.directory / REQUEST, devices, python)


def environment(stage: PlannedStage, cluster: Cluster) -> dict[str, str]:
    """Returns the environment variables that a stage gets in addition to those of the launcher."""
    threads = max(1, cores() // stage.devices)  # the ranks share the machine's cores
    single_rank = SINGLE_RANK if stage.config.resources.devices == 1 else {}
    return {"OMP_NUM_THREADS": str(threads), **single_rank, **stage_variables(stage, cluster)}


def write_scripts(plan: Plan, cluster: LocalConfig) -> None:
    """Writes ``run.sh`` of every stage that will run."""
    for stage in plan.todo():
        line = shlex.join(command(stage, sys.executable))
        write_script(stage, line, environment(stage, cluster))


def write_script(
    stage: PlannedStage, command: str, exports: Mapping[str, str], setup: str = ""
) -> None:
    """Writes ``run.sh``, with which the launcher or the user starts the stage.

    The script exports variables, runs the shell command ``setup`` if there is one, and then runs
    the stage's shell command.
    """
    lines = [
        "#!/usr/bin/env bash",
        "# shellcheck disable=SC2016 # text in single quotes must not be expanded",
        "set -euo pipefail",
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        f"cd {shlex.quote(os.getcwd())}",
        *([setup] if setup else []),
        f"exec {command}",
    ]
    path = stage.directory / SCRIPT
    write_text_atomically(path, "\n".join(lines) + "\n")
    path.chmod(0o755)


def may_fork(stage: PlannedStage) -> bool:
    """Returns whether the fork server can start the stage."""
    # The server's libraries have already read their environment variables.
    has_own_variables = bool(stage.config.resources.env)
    # The server has imported the current code.
    runs_old_code = stage.resumed is not None
    # For several devices, torchrun must start the stage, or a search's training runs.
    has_one_device = stage.devices == 1
    # A stage without torch starts fast without the server's imports.
    needs_torch = stage.definition.needs_torch
    return needs_torch and has_one_device and not (has_own_variables or runs_old_code)


def start(plan: Plan, cluster: LocalConfig, follow: Follow, console: Console) -> bool:
    """Runs the stages in order. Stages that the fork server can start share its imports."""
    forkable = [stage for stage in plan.todo() if may_fork(stage)]
    if len(forkable) < 2:  # with one stage there is no import to share
        return run_all(plan, follow)
    # Each forkable stage has one device and no ``resources.env``, so the variables differ only by
    # ``NEEDS_GPU``. If one stage has this variable, all stages get it.
    gpu_stage = next((stage for stage in forkable if stage.uses_gpu), forkable[0])
    shared_env = {**os.environ, **environment(gpu_stage, cluster)}
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
    """Starts a stage's ``run.sh``, and writes its output to ``log``."""
    return start_process([stage.directory / SCRIPT], log)


def run_all(plan: Plan, follow: Follow, start_stage: Start = start_script) -> bool:
    """Runs the stages in order; raises ``RecipeError`` if a stage leaves no new result.

    Returns:
        Always ``True``: an executor's ``start`` returns whether it waited for the stages.
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
