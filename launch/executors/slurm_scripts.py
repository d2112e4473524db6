"""The scripts of a chain on Slurm: a job for each stage, and what submits them."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.executors import container
from launch.executors.slurm_queue import RECORD
from launch.executors.slurm_settings import (
    SlurmConfig,
    margin_seconds,
    takes_whole_nodes,
    time_limit,
)
from launch.plan import Plan
from launch.planned import PlannedStage
from launch.staleness import SKIP


def job_script(stage: PlannedStage, cluster: SlurmConfig) -> str:
    """The text of a stage's job."""
    image = stage.image
    env = container.environment(cluster, stage)
    return _render(
        "job.sbatch.j2",
        stage=stage,
        cluster=cluster,
        resources=stage.config.resources,
        job_name=job_name(stage),
        replaces=made.started_at if (made := stage.made) else None,
        cwd=os.getcwd(),
        time=time_limit(stage, cluster),
        sbatch=list(_sbatch_options(stage, cluster)),
        env=env,
        image=image,
        mounts=container.mounts_of(stage, cluster) if image else [],
        # An image's own value of a variable wins unless it is named here.
        container_env=[*env, "OMP_NUM_THREADS"],
        python=shlex.quote(cluster.python or ("python" if image else sys.executable)),
        mpi=cluster.mpi.get(stage.config.stage) if stage.needs_gpu else None,
        margin_seconds=margin_seconds(stage, cluster),
    )


def job_name(stage: PlannedStage) -> str:
    """A name that no stage of another run has: Slurm runs one job of a name at a time."""
    run_dir = stage.directory.parent
    return f"{run_dir.name}.{stage.name}.{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"


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
    if takes_whole_nodes(stage, cluster):
        yield "--exclusive"
        yield "--mem=0"
    yield from cluster.sbatch
    yield from stage.config.resources.sbatch


def submit_script(plan: Plan) -> str:
    """The text of ``submit.sh``: the graph of the stages' inputs as dependencies of jobs."""
    pending = [stage for stage in plan.stages if stage.action != SKIP]
    variables = {stage.directory: "job_" + re.sub(r"\W", "_", stage.name) for stage in pending}
    rows = []
    for stage in pending:
        needed = sorted(
            {variables[r.directory] for r in stage.inputs.values() if r.directory in variables}
        )
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
