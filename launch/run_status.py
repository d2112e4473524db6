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
    jobs = read_jobs(run_dir)
    slurm_states = job_states(jobs.values())  # by job id
    holder = lock.read_holder(run_dir)
    last_plan = read_last_plan(run_dir)
    fingerprints = last_plan.stages if last_plan is not None else {}
    states = stage_states(run_dir, include=jobs)
    # Jobs of an earlier plan count only while they are active. The end of such a job says nothing
    # about the stage as last planned.
    jobs_of_plan = {
        name: job for name, job in jobs.items() if job.fingerprint == fingerprints.get(name)
    }
    incomplete = [name for name, s in states.items() if s.status is not Status.COMPLETE]
    jobs_of_incomplete = [jobs_of_plan[name] for name in incomplete if name in jobs_of_plan]
    # sacct remembers the final states of jobs that squeue no longer lists.
    slurm_states |= final_states(job for job in jobs_of_incomplete if job.id not in slurm_states)
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
    """Returns the status of a stage that runs or waits; ``None`` for any other stage.

    Args:
        state: The stage's state according to its files.
        job: The stage's newest Slurm job, which may be of an earlier plan.
        slurm_state: The state of ``job``; ``None`` if Slurm does not know it.
        holder: The launcher that has locked the run now.
    """
    name = state.directory.name
    if slurm_state and slurm_state.active:
        status = Status.RUNNING if slurm_state.running else Status.PENDING
        return StageStatus(state, status, progress_text(state, slurm_state.description), job)
    if holder and holder.stage == name:
        return StageStatus(state, Status.RUNNING, progress_text(state))
    # The launcher runs another stage, and starts this stage later.
    if holder and holder.stage and state.status is not Status.COMPLETE:
        return StageStatus(state, Status.PENDING, f"after {holder.stage}")
    return None


def _ended_status(
    state: StageState, job: SlurmJob | None, slurm_state: JobState | None
) -> StageStatus:
    """Returns the status of a stage that neither runs nor waits.

    ``job`` is the stage's newest Slurm job of the last plan, and ``slurm_state`` the job's state.
    """
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
    # The newest log may be of an earlier job. The name of a job's log is the job's id.
    job_log = log if job is None or (log and log.stem == job.id) else None
    # The stage failed: it recorded an error, or its job left a log or a final state.
    if state.error or (job and (job_log or job_state)):
        status = state.status if state.error else Status.FAILED
        texts = (job_state, failure(state.directory, job_log))  # ``job_state`` may be empty
        return StageStatus(state, status, ": ".join(filter(None, texts)), job)
    if job:
        # When a job fails, Slurm removes and forgets the jobs that depend on it.
        detail = "its job never started: cancelled, or a stage before it failed"
        return StageStatus(state, Status.CANCELLED, detail, job)
    if state.status is Status.INTERRUPTED:
        return StageStatus(state, state.status, progress_text(state))
    # If an incomplete stage has a result, its fingerprint differs from that of the last plan.
    stale = "its settings, inputs or code differ from those of the last plan"
    return StageStatus(state, state.status, stale if state.result else "")


def progress_text(state: StageState, detail: str = "") -> str:
    """Describes a stage's progress, such as "distill 5/10, 0:00:50 left; DETAIL".

    Leaves out what is unknown.
    """
    texts = [detail] if detail else []
    if records := state.progress():
        last, seconds = records[-1], remaining_seconds(records)
        text = f"{last['task']} {last['done']}/{last['total']}"
        texts.insert(0, f"{text}, {format_seconds(seconds)} left" if seconds else text)
    return "; ".join(texts)


def time_left(run_dir: Path, statuses: Sequence[StageStatus]) -> float | None:
    """Returns a run's remaining seconds; ``None`` if it is complete or has no planned times."""
    spent = {stage.name: stage.result.seconds for stage in statuses if stage.result}
    remaining: dict[str, float | None] = {}
    for stage in statuses:
        if not stage.result:
            # Without unfinished work, the records are of an earlier start, so they do not count.
            records = stage.state.progress() if stage.state.begun else []
            remaining[stage.name] = remaining_seconds(records) if records else None
    return remaining_run_seconds(planned_seconds(run_dir), spent, remaining)
