"""Submits a chain to Slurm: one job a stage, each after the jobs of its inputs."""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace

from rich.console import Console

from launch.cluster import Executor, Follow
from launch.executors import container
from launch.executors.slurm_queue import (
    ENDED_BY_SLURM,
    JobState,
    SlurmJob,
    active_jobs,
    job_states,
    read_jobs,
)
from launch.executors.slurm_scripts import job_script, submit_script
from launch.executors.slurm_settings import SlurmConfig, settings_problems
from launch.plan import Plan
from launch.planned import PlannedStage
from launch.staleness import ADOPT, SKIP
from recipes.core.errors import RecipeError
from recipes.core.files import write_text_atomically
from recipes.core.stage_process import LOGS, failure, newest_log
from recipes.core.wheels import cache_dir

SCRIPT = "job.sbatch"
SUBMIT = "submit.sh"
POLL_SECONDS = 2.0
RESTART_SECONDS = 900.0
"""In which a controller that is being restarted must answer again."""


def prepare(plan: Plan, cluster: SlurmConfig) -> Plan:
    """Refuses bad settings, and takes over the jobs of this run that still run or wait."""
    container.require_usable(plan, cluster)
    container.require_stages("mpi", cluster.mpi)
    if problems := list(settings_problems(plan.todo(), cluster)):
        raise RecipeError("\n".join(problems), fix="")
    return _adopt(plan)


def _adopt(plan: Plan) -> Plan:
    """Leaves stages to the jobs that were submitted for them; refuses jobs of another result."""
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


def write_scripts(plan: Plan, cluster: SlurmConfig) -> None:
    """Writes a job script for every stage that is to run, and one that submits them all."""
    for stage in plan.todo():
        (stage.directory / LOGS).mkdir(exist_ok=True)  # Slurm makes none
        write_text_atomically(stage.directory / SCRIPT, job_script(stage, cluster))
    path = plan.run_dir / SUBMIT
    write_text_atomically(path, submit_script(plan))
    path.chmod(0o755)


def start(plan: Plan, cluster: SlurmConfig, follow: Follow, console: Console) -> bool:
    """Submits the jobs; follows them, and refuses one that fails, only if asked."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    todo = plan.todo()
    if todo:
        _submit(plan)
    jobs = read_jobs(plan.run_dir)
    for stage in todo:
        console.print(f"{stage.name}: job {jobs[stage.name].id}")
    what = "submitted" if todo else "nothing to submit"
    console.print(f"{what}; see: python launch/run.py status run_dir={plan.run_dir}")
    if cluster.follow:
        for stage in plan.stages:
            if stage.action != SKIP:
                _follow(stage, jobs[stage.name], follow)
    return cluster.follow


def _submit(plan: Plan) -> None:
    """Submits the jobs of all that is to do; names the first one that Slurm refuses."""
    script, before = plan.run_dir / SUBMIT, read_jobs(plan.run_dir)
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    if done.returncode:
        jobs = read_jobs(plan.run_dir)
        refused, *_ = [s.name for s in plan.todo() if jobs.get(s.name) == before.get(s.name)]
        raise RecipeError(
            f"the job of {refused} was refused: {done.stderr.strip()}\n"
            "  what was submitted before it stays",
            f"correct cluster=slurm's settings and run the same command, or run {script}",
        )


def _follow(stage: PlannedStage, job: SlurmJob, follow: Follow) -> None:
    """Shows a stage's progress until its job has ended."""
    with follow(stage) as follower:
        state = _state(job)
        while state is not None and state.active:
            time.sleep(POLL_SECONDS)
            follower.update()
            state = _state(job)
        follower.update()
        # The result that a forced stage replaces has the same fingerprint.
        if stage.made is None or (state is not None and state.state != "COMPLETED"):
            ended = f" ({state.state})" if state else ""
            log = newest_log(stage.directory)
            why = ENDED_BY_SLURM.get(state.state) if state else None
            raise RecipeError(
                f"stage {stage.name}, job {job.id}, failed{ended}: "
                f"{why or failure(stage.directory, log)}\n  log: {log}",
                fix="",
            )


def _state(job: SlurmJob) -> JobState | None:
    """What Slurm says of a job, whose node does not need its controller to go on."""
    deadline = time.monotonic() + RESTART_SECONDS
    while True:
        try:
            return job_states([job]).get(job.id)
        except RecipeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


EXECUTOR = Executor(
    config=SlurmConfig,
    prepare=prepare,
    write_scripts=write_scripts,
    start=start,
    follows=lambda cluster: cluster.follow,
)
