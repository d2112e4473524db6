"""Settings of ``cluster=slurm``, and the scripts of its jobs: one for each stage."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from launch.executors import container
from launch.executors.slurm_queue import RECORD
from launch.plan import Plan
from launch.planned import SKIP, PlannedStage
from recipes.core.constraints import Count, CountOrZero, Duration, matching, one_of
from recipes.core.stage import SbatchOption
from recipes.planning.limits import slurm_seconds
from recipes.planning.training_cost import stopping_seconds

PLAIN = re.compile(r"[\w./@+=-]+")
MIN_MARGIN_SECONDS = 300
"""Covers what the estimate leaves out: it does not shrink with the training."""
Name = Annotated[str, matching(r"[\w.,@+=-]+", "a name without spaces")]
Program = Annotated[str, matching(PLAIN.pattern, "one program, without spaces")]


@dataclass
class SlurmConfig(container.Containers):
    """Settings of ``cluster=slurm``."""

    executor: str = "slurm"
    partition: Name | None = None
    """Slurm's partition."""
    account: Name | None = None
    """Slurm's account."""
    qos: Name | None = None
    """Slurm's quality of service."""
    time: Duration = "04:00:00"
    """Limit of one job, ``HH:MM:SS`` or ``D-HH:MM:SS``; ``resources.time`` for one stage."""
    cpu_partition: Name | None = None
    """Partition of stages that use no GPU; ``partition`` by default."""
    margin_seconds: Count | None = None
    """Training stops and saves this long before the limit. By default the planned time of two
    steps, a validation and a checkpoint, but at least ``MIN_MARGIN_SECONDS``."""
    max_requeues: CountOrZero = 20
    """How often a stage is started again after it stopped at its time limit."""
    gpus: Annotated[str, one_of("gpus-per-node", "gres")] | None = "gpus-per-node"
    """How jobs request GPUs: ``gpus-per-node`` or ``gres``. ``null`` requests none, for nodes that
    are allocated whole or have no GPUs."""
    cpus_per_task: Count | None = None
    """CPUs of all processes of a node together."""
    exclusive: bool | None = None
    """Whether jobs take whole nodes with all of their memory; by default only jobs of several ranks
    do."""
    mpi: dict[str, str | None] = field(default_factory=dict)
    """For ``srun --mpi``, by stage module; used where the stage starts TensorRT-LLM."""
    sbatch: list[SbatchOption] = field(default_factory=list)
    """Further options of sbatch; ``resources.sbatch`` for one stage."""
    python: Program | None = None
    """Interpreter on the nodes; by default the launcher's own, or ``python`` of the image."""
    follow: bool = False
    """Waits for the submitted jobs and shows their progress."""


def settings_problems(stages: Iterable[PlannedStage], cluster: SlurmConfig) -> Iterator[str]:
    """Yields settings that sbatch would refuse, or that would make the stages' jobs fail."""
    if not PLAIN.fullmatch(os.getcwd()):
        yield f"{os.getcwd()} has a character that job options cannot hold\n  fix: work elsewhere"
    for stage in stages:
        own = stage.config.resources.time is not None
        key = f"stages.{stage.name}.resources.time" if own else "cluster.time"
        limit, margin = _time_limit(stage, cluster), _margin_seconds(stage, cluster)
        if slurm_seconds(limit) <= margin:
            yield (
                f"{key}={limit} is too short: {stage.name} stops {margin} s before it\n"
                "  fix: raise it, or set cluster.margin_seconds"
            )
        if not PLAIN.fullmatch(str(stage.directory)):
            yield (
                f"{stage.directory} has a character that job options cannot hold\n"
                "  fix: set run_dir to a path of letters, digits and ./@+=_-"
            )


def _time_limit(stage: PlannedStage, cluster: SlurmConfig) -> str:
    return cluster.time if stage.config.resources.time is None else stage.config.resources.time


def _margin_seconds(stage: PlannedStage, cluster: SlurmConfig) -> int:
    """Returns how long before its limit a job's training stops."""
    if cluster.margin_seconds is not None:
        return cluster.margin_seconds
    workload = stage.workload
    seconds = stopping_seconds(workload, stage.chain.hardware) if workload is not None else 0
    return max(MIN_MARGIN_SECONDS, math.ceil(seconds))


def job_script(stage: PlannedStage, cluster: SlurmConfig) -> str:
    """Returns the text of a stage's ``job.sbatch``."""
    image, run_dir = stage.image, stage.directory.parent
    env = container.environment(cluster, stage)
    return _render(
        "job.sbatch.j2",
        stage=stage,
        cluster=cluster,
        resources=stage.config.resources,
        # Unique to the stage and its run: Slurm runs one job of a name at a time.
        job_name=f"{run_dir.name}.{stage.name}."
        + hashlib.sha256(str(run_dir).encode()).hexdigest()[:8],
        replaces=made.started_at if (made := stage.result) else None,
        cwd=os.getcwd(),
        time=_time_limit(stage, cluster),
        sbatch=list(_sbatch_options(stage, cluster)),
        env=env,
        image=image,
        mounts=container.mounts_of(stage, cluster) if image else [],
        # The image's own values of variables win, except for variables that are named here.
        container_env=[*env, "OMP_NUM_THREADS"],
        python=shlex.quote(cluster.python or ("python" if image else sys.executable)),
        mpi=cluster.mpi.get(stage.config.stage) if stage.needs_gpu else None,
        margin_seconds=_margin_seconds(stage, cluster),
    )


def _sbatch_options(stage: PlannedStage, cluster: SlurmConfig) -> Iterator[str]:
    partition = cluster.partition
    if cluster.cpu_partition and not stage.needs_gpu:
        partition = cluster.cpu_partition
    named = {"partition": partition, "account": cluster.account, "qos": cluster.qos}
    yield from (f"--{name}={value}" for name, value in named.items() if value)
    if cluster.gpus and stage.needs_gpu:
        option = "gpus-per-node=" if cluster.gpus == "gpus-per-node" else "gres=gpu:"
        yield f"--{option}{stage.config.resources.devices}"
    if cluster.cpus_per_task:
        yield f"--cpus-per-task={cluster.cpus_per_task}"
    several_ranks = stage.config.resources.ranks > 1
    if several_ranks if cluster.exclusive is None else cluster.exclusive:
        yield "--exclusive"
        yield "--mem=0"
    yield from cluster.sbatch
    yield from stage.config.resources.sbatch


def submit_script(plan: Plan) -> str:
    """Returns the text of ``submit.sh``, where each job depends on the jobs of its inputs."""
    pending = [stage for stage in plan.stages if stage.action != SKIP]
    variables = {stage.directory: "job_" + re.sub(r"\W", "_", stage.name) for stage in pending}
    rows = []
    for stage in pending:
        inputs = {ref.directory for ref in stage.inputs.values()}
        needed = sorted(variables[directory] for directory in inputs & variables.keys())
        after = "afterok" + "".join(f":${name}" for name in needed) + "," if needed else ""
        rows.append(
            {
                "name": stage.name,
                "variable": variables[stage.directory],
                "fingerprint": stage.fingerprint,
                "dependency": f"{after}singleton",
            }
        )
    return _render("submit.sh.j2", run_dir=plan.run_dir, record=RECORD, stages=rows)


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment, StrictUndefined  # only Slurm needs it

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    text = (Path(__file__).parent / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(values)
