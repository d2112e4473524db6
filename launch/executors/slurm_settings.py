"""Settings of ``cluster=slurm``, and what can be wrong with them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

from launch.executors.container import Containers
from launch.planned import PlannedStage
from recipes.core.constraints import Count, CountOrZero, Duration, matching, one_of
from recipes.core.stage import SbatchOption
from recipes.planning.limits import slurm_seconds
from recipes.planning.training_cost import stopping_seconds

PLAIN = re.compile(r"[\w./@+=-]+")
LEAST_MARGIN = 300
"""Seconds: what an estimate of a small training leaves out does not get small with it."""
GPU_OPTIONS = ("gpus-per-node", "gres")
Name = Annotated[str, matching(r"[\w.,@+=-]+", "a name without spaces")]
Program = Annotated[str, matching(PLAIN.pattern, "one program, without spaces")]


@dataclass
class SlurmConfig(Containers):
    """Settings of ``cluster=slurm``."""

    executor: str = "slurm"
    partition: Name | None = None
    """Where jobs go."""
    account: Name | None = None
    """Who pays."""
    qos: Name | None = None
    """Slurm's quality of service."""
    time: Duration = "04:00:00"
    """Limit of one job, ``HH:MM:SS`` or ``D-HH:MM:SS``; ``resources.time`` for one stage."""
    cpu_partition: Name | None = None
    """For stages that use no GPU; ``partition`` by default."""
    margin_seconds: Count | None = None
    """Training stops and saves this long before the limit; by default what the planner says that
    two steps, a validation and a checkpoint take, and ``LEAST_MARGIN`` at least."""
    max_requeues: CountOrZero = 20
    """How often a stage that was stopped by the clock is started again."""
    gpus: Annotated[str, one_of(*GPU_OPTIONS)] | None = "gpus-per-node"
    """How jobs request GPUs: ``gpus-per-node`` or ``gres``; ``null`` if nodes come whole, or have
    none."""
    cpus_per_task: Count | None = None
    """CPUs of a node's processes, all together."""
    exclusive: bool | None = None
    """Whether jobs take whole nodes, with all of their memory; by default those of several ranks
    do."""
    mpi: dict[str, str | None] = field(default_factory=dict)
    """For ``srun --mpi``, by stage module, where it starts TensorRT-LLM."""
    sbatch: list[SbatchOption] = field(default_factory=list)
    """Further options of sbatch; ``resources.sbatch`` for one stage."""
    python: Program | None = None
    """Interpreter on the nodes: the launcher's own, or an image's ``python``, by default."""
    follow: bool = False
    """Waits for the submitted jobs and shows their progress."""


def settings_problems(stages: Iterable[PlannedStage], cluster: SlurmConfig) -> Iterator[str]:
    """Everything that sbatch would refuse, or that would fail in the jobs of the stages."""
    if not PLAIN.fullmatch(os.getcwd()):
        yield f"{os.getcwd()} has a character that job options cannot hold\n  fix: work elsewhere"
    for stage in stages:
        yield from _stage_problems(stage, cluster)


def _stage_problems(stage: PlannedStage, cluster: SlurmConfig) -> Iterator[str]:
    resources, where = stage.config.resources, f"stages.{stage.name}.resources"
    limit = slurm_seconds(time_limit(stage, cluster))
    key = f"{where}.time" if resources.time is not None else "cluster.time"
    if limit <= (margin := margin_seconds(stage, cluster)):
        yield (
            f"{key}={time_limit(stage, cluster)} is not longer than the {margin} s before it in "
            f"which {stage.name} stops\n"
            "  fix: raise it, or set cluster.margin_seconds"
        )
    if not PLAIN.fullmatch(str(stage.directory)):
        yield (
            f"{stage.directory} has a character that job options cannot hold\n"
            "  fix: set run_dir to a path of letters, digits and ./@+=_-"
        )


def time_limit(stage: PlannedStage, cluster: SlurmConfig) -> str:
    """Limit of the stage's job."""
    return cluster.time if stage.config.resources.time is None else stage.config.resources.time


def margin_seconds(stage: PlannedStage, cluster: SlurmConfig) -> int:
    """How long before its limit a job's work stops."""
    if cluster.margin_seconds is not None:
        return cluster.margin_seconds
    job = stage.workload
    need = stopping_seconds(job, stage.chain.hardware) if job is not None else 0
    return max(LEAST_MARGIN, math.ceil(need))


def takes_whole_nodes(stage: PlannedStage, cluster: SlurmConfig) -> bool:
    """Whether no other job may be on the nodes of the stage's job."""
    several = stage.config.resources.ranks > 1
    return several if cluster.exclusive is None else cluster.exclusive
