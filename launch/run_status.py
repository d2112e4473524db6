"""The status of each stage of a run, from its files, the run's lock and Slurm's queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import lock
from launch.progress import (
    format_seconds,
    planned_seconds,
    remaining_run_seconds,
    remaining_seconds,
)
from launch.slurm_queue import (
    STATE_REASONS,
    JobState,
    SlurmJob,
    final_states,
    job_states,
    read_jobs,
)
from recipes.core.manifest import Manifest
from recipes.core.run_state import StageState, Status, read_last_plan, stage_states
from recipes.core.stage_process import failure, newest_log


@dataclass(frozen=True)
class StageStatus:
    """A stage's status, details for the user, and its newest Slurm job, if it has one."""

    state: StageState
    status: Status
    detail: str = ""
    job: SlurmJob | None = None

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.state.directory.name

    @property
    def result(self) -> Manifest | None:
        """The stage's result; ``None`` unless the stage is complete."""
        return self.state.result if self.status is Status.COMPLETE else None


def read_statuses(run_dir: Path) -> list[StageStatus]:
    """Returns the status of every stage of a run."""
    jobs, holder = read_jobs(run_dir), lock.read_holder(run_dir)
    slurm_states, plan = job_states(jobs.values()), read_last_plan(run_dir)
    planned = plan.stages if plan is not None else {}
    states = stage_states(run_dir, include=jobs)
    # Jobs of an earlier plan count only while they are active: their end says nothing about the
    # stage's present status.
    jobs_of_plan = {n: job for n, job in jobs.items() if job.fingerprint == planned.get(n)}
    incomplete = {n for n, state in states.items() if state.status is not Status.COMPLETE}
    ended_jobs = [
        j for n, j in jobs_of_plan.items() if n in incomplete and j.id not in slurm_states
    ]
    slurm_states |= final_states(ended_jobs)
    statuses = []
    for name, state in states.items():
        job = jobs.get(name)
        slurm_state = slurm_states.get(job.id) if job else None
        active = _active_status(state, job, slurm_state, holder)
        statuses.append(active or _ended_status(state, jobs_of_plan.get(name), slurm_state))
    return statuses


def _active_status(
    state: StageState,
    job: SlurmJob | None,
    slurm_state: JobState | None,
    holder: lock.Holder | None,
) -> StageStatus | None:
    """Returns the status of a stage that runs or waits; ``None`` for any other stage."""
    name = state.directory.name
    if slurm_state and slurm_state.active:
        status = Status.RUNNING if slurm_state.running else Status.PENDING
        return StageStatus(state, status, progress_text(state, slurm_state.description), job)
    if holder and holder.stage == name:
        return StageStatus(state, Status.RUNNING, progress_text(state))
    if holder and holder.stage and state.status is not Status.COMPLETE:
        return StageStatus(state, Status.PENDING, f"after {holder.stage}")
    return None


def _ended_status(
    state: StageState, job: SlurmJob | None, slurm_state: JobState | None
) -> StageStatus:
    """Returns the status of a stage that neither runs nor waits."""
    if state.status is Status.COMPLETE and state.result is not None:
        return StageStatus(state, Status.COMPLETE, f"{state.result.seconds:.0f} s", job)
    if state.status is Status.STOPPED:
        return StageStatus(state, Status.STOPPED, state.error, job)
    job_state = slurm_state.state if job and slurm_state else ""
    if job_state == "CANCELLED":
        detail = "repeat the command of the run to submit it again"
        return StageStatus(state, Status.CANCELLED, detail, job)
    if reason := STATE_REASONS.get(job_state):
        return StageStatus(state, Status.FAILED, f"{job_state}: {reason}", job)
    log = newest_log(state.directory)
    # The newest log may belong to an earlier job. Slurm names a log by the id of its job.
    job_log = log if job is None or (log and log.stem == job.id) else None
    # The stage failed: it recorded an error, or its job left a log or a final state.
    if state.error or (job and (job_log or job_state)):
        status = state.status if state.error else Status.FAILED
        texts = (job_state, failure(state.directory, job_log))
        return StageStatus(state, status, ": ".join(filter(None, texts)), job)
    if job:
        # When a job fails, Slurm removes and forgets the jobs that depend on it.
        detail = "its job never started: cancelled, or a stage before it failed"
        return StageStatus(state, Status.CANCELLED, detail, job)
    if state.status is Status.INTERRUPTED:
        return StageStatus(state, state.status, progress_text(state))
    stale = "its settings, inputs or code differ from those of the last plan"
    detail = stale if state.result else ""
    return StageStatus(state, state.status, detail)


def progress_text(state: StageState, detail: str = "") -> str:
    """Returns a stage's last progress, its remaining time, and a detail, as far as they exist."""
    texts = [detail] if detail else []
    if records := state.progress():
        last, left = records[-1], remaining_seconds(records)
        text = f"{last['task']} {last['done']}/{last['total']}"
        texts.insert(0, f"{text}, {format_seconds(left)} left" if left else text)
    return "; ".join(texts)


def time_left(run_dir: Path, statuses: Sequence[StageStatus]) -> float | None:
    """Returns how many seconds a run will still take.

    ``None`` if the run is complete, or if its stage ``plan`` has no result with planned times.
    """
    spent = {stage.name: stage.result.seconds for stage in statuses if stage.result}
    remaining: dict[str, float | None] = {}
    for stage in statuses:
        if not stage.result:
            # Without unfinished work, the records are of an earlier start.
            records = stage.state.progress() if stage.state.begun else []
            remaining[stage.name] = remaining_seconds(records) if records else None
    return remaining_run_seconds(planned_seconds(run_dir), spent, remaining)
