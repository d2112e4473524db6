"""What has become of each stage of a run, by its files, its launcher's lock and Slurm's queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import lock
from launch.executors.slurm_queue import (
    ENDED_BY_SLURM,
    JobState,
    SlurmJob,
    final_state,
    job_states,
    read_jobs,
)
from launch.time_left import in_words, planned_seconds, run_left, seconds_left
from recipes.core.manifest import Manifest
from recipes.core.run_state import StageState, Status, read_last_plan, stage_states
from recipes.core.stage_process import failure, newest_log


@dataclass(frozen=True)
class StageStatus:
    """A stage's status, what there is to say about it, and its Slurm job, if it had one."""

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
        """Its result, if it is complete."""
        return self.state.result if self.status is Status.COMPLETE else None


def read_statuses(run_dir: Path) -> list[StageStatus]:
    """Returns the status of every stage of a run.

    Raises:
        RecipeError: Slurm has jobs of the run and does not answer.
    """
    jobs = read_jobs(run_dir)
    queue = job_states(jobs.values())
    holder = lock.holder(run_dir)
    plan = read_last_plan(run_dir)
    planned = plan.stages if plan is not None else {}
    statuses = []
    for name, state in stage_states(run_dir, also=jobs).items():
        job = jobs.get(name)
        statuses.append(
            _at_work(state, job, queue, holder)
            or _ended(state, job if job and job.fingerprint == planned.get(name) else None, queue)
        )
    return statuses


def _at_work(
    state: StageState,
    job: SlurmJob | None,
    queue: Mapping[str, JobState],
    holder: lock.Holder | None,
) -> StageStatus | None:
    """The status of a stage that runs, or will; ``None`` of any other."""
    name, queued = state.directory.name, queue.get(job.id) if job else None
    if queued and queued.active:
        if queued.state == "PENDING":
            why = queued.reason if queued.reason not in ("", "None") else "is about to start"
            return StageStatus(state, Status.PENDING, _with_progress(state, why), job)
        limit = f"{queued.time_left} to its limit on {queued.nodes}"
        return StageStatus(state, Status.RUNNING, _with_progress(state, limit), job)
    if holder and holder.stage == name:
        return StageStatus(state, Status.RUNNING, _with_progress(state))
    if holder and holder.stage and state.status is not Status.COMPLETE:
        return StageStatus(state, Status.PENDING, f"after {holder.stage}")
    return None


def _ended(state: StageState, job: SlurmJob | None, queue: Mapping[str, JobState]) -> StageStatus:
    """The status of a stage that nothing works on."""
    if state.status is Status.COMPLETE and state.result is not None:
        return StageStatus(state, Status.COMPLETE, f"{state.result.seconds:.0f} s", job)
    if state.status is Status.STOPPED:
        return StageStatus(state, Status.STOPPED, state.error, job)
    queued = queue.get(job.id) if job else None
    by_slurm = (queued.state if queued else final_state(job)) or "" if job else ""
    if by_slurm.startswith("CANCELLED"):
        return StageStatus(state, Status.CANCELLED, "the same command submits it again", job)
    if why := ENDED_BY_SLURM.get(by_slurm.rstrip("+")):
        return StageStatus(state, Status.FAILED, f"{by_slurm}: {why}", job)
    log = newest_log(state.directory)
    if state.error or (job and log and log.stem == job.id):
        status = state.status if state.error else Status.FAILED
        said = (by_slurm, failure(state.directory, log))
        return StageStatus(state, status, ": ".join(filter(None, said)), job)
    if job:
        # With --kill-on-invalid-dep Slurm removes what waits for a job that failed, and forgets it.
        note = "its job never started: cancelled, or a stage before it did not succeed"
        return StageStatus(state, Status.CANCELLED, note, job)
    if state.status is Status.INTERRUPTED:
        return StageStatus(state, state.status, _with_progress(state))
    other = "its result is of other settings, inputs or code" if state.result else ""
    return StageStatus(state, state.status, other)


def _with_progress(state: StageState, note: str = "") -> str:
    return "; ".join(filter(None, (progress(state), note)))


def progress(state: StageState) -> str:
    """How far a stage is and how long it will still take, by its records; empty without any."""
    records = state.progress()
    if not records:
        return ""
    last, left = records[-1], seconds_left(records)
    text = f"{last['task']} {last['done']}/{last['total']}"
    return f"{text}, {in_words(left)} left" if left else text


def time_left(run_dir: Path, statuses: Sequence[StageStatus]) -> float | None:
    """Seconds that a run will still take; ``None`` if it is complete or has no plan."""
    spent = {stage.name: stage.result.seconds for stage in statuses if stage.result}
    ahead: dict[str, float | None] = {}
    for stage in statuses:
        if not stage.result:
            records = stage.state.progress() if stage.state.begun else []
            ahead[stage.name] = seconds_left(records) if records else None
    return run_left(planned_seconds(run_dir), spent, ahead)
