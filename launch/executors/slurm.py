"""Submits a chain to Slurm: one job for each stage, which waits for the jobs of its inputs."""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace

from rich.console import Console

from launch.cluster import Follow
from launch.executors import container
from launch.executors.slurm_jobs import SlurmConfig, job_script, settings_problems, submit_script
from launch.executors.slurm_queue import (
    STATE_REASONS,
    JobState,
    SlurmJob,
    active_jobs,
    job_states,
    read_jobs,
)
from launch.plan import Plan
from launch.planned import ADOPT, SKIP, PlannedStage
from recipes.core.errors import RecipeError
from recipes.core.files import write_text_atomically
from recipes.core.stage_process import LOGS, failure, newest_log
from recipes.core.wheels import cache_dir

CONFIG = SlurmConfig
SCRIPT = "job.sbatch"
SUBMIT = "submit.sh"
POLL_SECONDS = 2.0
RESTART_SECONDS = 900.0
"""Longest restart of Slurm's controller, which does not answer meanwhile."""


def prepare(plan: Plan, cluster: SlurmConfig) -> Plan:
    """Refuses invalid settings; leaves stages to the jobs that already run or wait for them."""
    container.require_usable(plan, cluster)
    container.require_stages("mpi", cluster.mpi)
    if problems := list(settings_problems(plan.todo(), cluster)):
        raise RecipeError("\n".join(problems), fix="")
    active = active_jobs(plan.run_dir)
    stages = []
    for stage in plan.stages:
        if stage.name not in active:
            stages.append(stage)
            continue
        job, state = active[stage.name]
        reason = f"job {job.id} is {state.state.lower()}"
        if job.fingerprint != stage.fingerprint:
            raise RecipeError(
                f"{reason} for {stage.name} with other settings, inputs or code.",
                f"wait for it, or: python launch/run.py cancel run_dir={plan.run_dir}",
            )
        stages.append(replace(stage, action=ADOPT, reason=reason))
    return replace(plan, stages=tuple(stages))


def write_scripts(plan: Plan, cluster: SlurmConfig) -> None:
    """Writes a job script for every stage that will run, and a script that submits all of them."""
    for stage in plan.todo():
        (stage.directory / LOGS).mkdir(exist_ok=True)  # Slurm does not create it
        write_text_atomically(stage.directory / SCRIPT, job_script(stage, cluster))
    path = plan.run_dir / SUBMIT
    write_text_atomically(path, submit_script(plan))
    path.chmod(0o755)


def start(plan: Plan, cluster: SlurmConfig, follow: Follow, console: Console) -> bool:
    """Submits the jobs. With ``cluster.follow``, waits for them and raises if one fails."""
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
    script, before = plan.run_dir / SUBMIT, read_jobs(plan.run_dir)
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    if done.returncode:
        jobs = read_jobs(plan.run_dir)
        refused, *_ = [s.name for s in plan.todo() if jobs.get(s.name) == before.get(s.name)]
        raise RecipeError(
            f"Slurm refused the job of {refused}: {done.stderr.strip()}\n"
            "  the jobs submitted before it stay in the queue",
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
        # A forced stage may still have its old result, whose fingerprint is the same.
        if stage.result is None or (state is not None and state.state != "COMPLETED"):
            ended = f" ({state.state})" if state else ""
            log = newest_log(stage.directory)
            why = STATE_REASONS.get(state.state) if state else None
            raise RecipeError(
                f"stage {stage.name}, job {job.id}, failed{ended}: "
                f"{why or failure(stage.directory, log)}\n  log: {log}",
                fix="",
            )


def _state(job: SlurmJob) -> JobState | None:
    """Returns a job's state; waits while the controller restarts, as the job continues."""
    deadline = time.monotonic() + RESTART_SECONDS
    while True:
        try:
            return job_states([job]).get(job.id)
        except RecipeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)
