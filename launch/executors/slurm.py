"""Submits a chain to Slurm: one job a stage, each after the jobs of its inputs."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from rich.console import Console

from launch.cluster import Follow
from launch.executors import container
from launch.executors.container import Containers
from launch.executors.slurm_queue import Job, active_jobs, job_states, read_jobs
from launch.executors.slurm_scripts import job_script, submit_script, time_limit
from launch.logs import LOGS, newest_log, reason
from launch.plan import Plan, PlannedStage
from launch.status import ADOPT, SKIP
from recipes.errors import RecipeError
from recipes.manifest import read_manifest, write_text_atomically
from recipes.sources import cache_dir

SCRIPT = "job.sbatch"
SUBMIT = "submit.sh"
TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)")
PLAIN = re.compile(r"[\w./@+=-]+")
GPU_OPTIONS = ("gpus-per-node", "gres", "none")
POLL_SECONDS = 2.0


@dataclass
class Config(Containers):
    """Settings of ``cluster=slurm``."""

    executor: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "04:00:00"
    """Limit of one job, ``HH:MM:SS`` or ``D-HH:MM:SS``; ``resources.time`` for one stage."""
    margin_seconds: int = 300
    """Training stops and saves this long before the limit: more than a step and a checkpoint."""
    max_requeues: int = 20
    """How often a stage that was stopped by the clock is started again."""
    gpus: str = "gpus-per-node"
    """How GPUs are asked for: ``gpus-per-node``, ``gres``, or ``none`` where nodes come whole."""
    cpus_per_task: int | None = None
    """CPUs of a node's processes, all together."""
    exclusive: bool = False
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch; ``resources.sbatch`` for one stage."""
    python: str | None = None
    """Interpreter on the nodes: the launcher's own, or an image's ``python``, by default."""
    follow: bool = False
    """Waits for the submitted jobs and shows their progress."""


def prepare(plan: Plan, cluster: Config) -> Plan:
    """Refuses bad settings, and takes over the jobs of this run that still run or wait."""
    container.require_usable(plan, cluster)
    problems = [*_cluster_problems(cluster)]
    for stage in plan.todo():
        problems += _stage_problems(stage, cluster)
    if problems:
        raise RecipeError("\n".join(problems))
    return _adopt(plan)


def seconds(text: str) -> int | None:
    """Seconds of ``[D-]HH:MM:SS``; ``None`` for another text."""
    found = TIME.fullmatch(text)
    if not found:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _cluster_problems(cluster: Config) -> Iterator[str]:
    if cluster.gpus not in GPU_OPTIONS:
        yield f"cluster.gpus={cluster.gpus}\n  fix: use one of: {', '.join(GPU_OPTIONS)}"
    for name in ("partition", "account", "qos"):
        value = getattr(cluster, name)
        if value is not None and not re.fullmatch(r"[\w.,@+=-]+", value):
            yield f"cluster.{name}='{value}' is not a name\n  fix: give a name without spaces"
    for name, least in (("margin_seconds", 1), ("max_requeues", 0), ("cpus_per_task", 1)):
        value = getattr(cluster, name)
        if value is not None and value < least:
            yield f"cluster.{name}={value}\n  fix: use {least} or more"
    if cluster.python is not None and not PLAIN.fullmatch(cluster.python):
        yield f"cluster.python={cluster.python}\n  fix: give one program, without spaces"
    if not PLAIN.fullmatch(os.getcwd()):
        yield f"{os.getcwd()} has a character that job options cannot hold\n  fix: work elsewhere"


def _stage_problems(stage: PlannedStage, cluster: Config) -> Iterator[str]:
    resources, where = stage.config.resources, f"stages.{stage.name}.resources"
    if resources.nodes < 1 or resources.devices < 1:
        yield (
            f"{where}.nodes={resources.nodes}, devices={resources.devices}\n  fix: use 1 or more"
        )
    limit = seconds(time_limit(stage, cluster))
    key = f"{where}.time" if resources.time is not None else "cluster.time"
    if not limit:
        yield (
            f"{key}={time_limit(stage, cluster)} is not a time\n"
            "  fix: write HH:MM:SS or D-HH:MM:SS, in quotes in a YAML file"
        )
    elif limit <= cluster.margin_seconds:
        yield (
            f"{key}={time_limit(stage, cluster)} is not longer than "
            f"cluster.margin_seconds={cluster.margin_seconds}\n"
            "  fix: raise the one or lower the other"
        )
    for option in (*cluster.sbatch, *resources.sbatch):
        if not option.startswith("--") or "\n" in option:
            yield (
                f"'{option}' is not an option of sbatch (cluster.sbatch, {where}.sbatch)\n"
                "  fix: for example 'cluster.sbatch=[\"--mem=0\"]'"
            )
    if not PLAIN.fullmatch(str(stage.directory)):
        yield (
            f"{stage.directory} has a character that job options cannot hold\n"
            "  fix: set run_dir to a path of letters, digits and ./@+=_-"
        )


def _adopt(plan: Plan) -> Plan:
    """Leaves stages to the jobs that were submitted for them before.

    Raises:
        RecipeError: Such a job works on another result than the one that is asked for.
    """
    active = active_jobs(plan.run_dir)
    stages = []
    for stage in plan.stages:
        if stage.name not in active:
            stages.append(stage)
            continue
        job, state = active[stage.name]
        if job.fingerprint != stage.fingerprint:
            raise RecipeError(
                f"job {job.id} is {state.state.lower()} for {stage.name} with other settings, "
                "inputs or code.",
                f"wait for it, or: python launch/run.py cancel run_dir={plan.run_dir}",
            )
        note = f"job {job.id} is {state.state.lower()}"
        stages.append(replace(stage, action=ADOPT, reason=note))
    return replace(plan, stages=tuple(stages))


def write_scripts(plan: Plan, cluster: Config) -> None:
    """Writes a job script for every stage that is to run, and one that submits them all."""
    for stage in plan.todo():
        (stage.directory / LOGS).mkdir(exist_ok=True)  # Slurm makes none
        write_text_atomically(stage.directory / SCRIPT, job_script(stage, cluster))
    path = plan.run_dir / SUBMIT
    write_text_atomically(path, submit_script(plan))
    path.chmod(0o755)


def start(plan: Plan, cluster: Config, follow: Follow, console: Console) -> bool:
    """Submits the jobs; follows them only if asked.

    Raises:
        RecipeError: Slurm refuses a job, or a followed stage fails.
    """
    cache_dir().mkdir(parents=True, exist_ok=True)
    script = plan.run_dir / SUBMIT
    if plan.todo():
        done = subprocess.run([script], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RecipeError(
                f"a job was refused: {done.stderr.strip()}\n  what was submitted before it stays",
                f"correct cluster=slurm's settings and run the same command, or run {script}",
            )
    jobs = read_jobs(plan.run_dir)
    for stage in plan.todo():
        console.print(f"{stage.name}: job {jobs[stage.name].id}")
    what = "submitted" if plan.todo() else "nothing to submit"
    console.print(f"{what}; see: python launch/run.py status run_dir={plan.run_dir}")
    if cluster.follow:
        for stage in plan.stages:
            if stage.action != SKIP:
                _follow(stage, jobs[stage.name], follow)
    return cluster.follow


def _follow(stage: PlannedStage, job: Job, follow: Follow) -> None:
    """Shows a stage's progress until its job has ended."""
    with follow(stage) as follower:
        state = job_states([job]).get(job.id)
        while state is not None and state.active:
            time.sleep(POLL_SECONDS)
            follower.update()
            state = job_states([job]).get(job.id)
        follower.update()
        manifest = read_manifest(stage.directory)
        complete = manifest is not None and manifest.fingerprint == stage.fingerprint
        # The result that a forced stage replaces has the same fingerprint.
        if not complete or (state is not None and state.state != "COMPLETED"):
            ended = f" ({state.state})" if state else ""
            log = newest_log(stage.directory)
            raise RecipeError(
                f"stage {stage.name}, job {job.id}, failed{ended}: {reason(stage.directory, log)}"
                f"\n  log: {log}"
            )
