"""What has become of each stage of a run, read from its directory and from Slurm."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from launch import lock
from launch.executors.slurm_queue import (
    ENDED_BY_SLURM,
    JobState,
    SlurmJob,
    final_state,
    job_states,
    read_jobs,
)
from launch.logs import ERROR, newest_log, reason
from launch.time_left import Expected, in_words, planned_seconds, seconds_left
from recipes.core.deadline import STOPPED
from recipes.core.errors import RecipeError
from recipes.core.manifest import MANIFEST, WORK, Manifest, read_manifest
from recipes.core.metrics import METRICS, Record, read_records
from recipes.core.stage import REQUEST, RUN_FILE, planned_stages, unfinished

COMPLETE, RUNNING, PENDING, FAILED = "complete", "running", "pending", "failed"
STOPPED_STATE, CANCELLED, NOT_RUN = "stopped", "cancelled", "not run"


@dataclass(frozen=True)
class StageState:
    """A stage's state, what there is to say about it, and its Slurm job, if it had one."""

    name: str
    state: str
    detail: str = ""
    job: SlurmJob | None = None
    manifest: Manifest | None = None


def runs_in(directory: Path) -> list[Path]:
    """The run in a directory, or those of a sweep; refuses a directory without one."""
    if (directory / RUN_FILE).is_file():
        return [directory]
    found = sorted(file.parent for file in directory.glob(f"*/{RUN_FILE}"))
    if not found:
        raise RecipeError(
            f"{directory} is not a run: it has no {RUN_FILE}, nor has a folder in it.",
            "give run_dir=DIR as the run had it; python launch/run.py runs lists those in runs",
        )
    return found


def requests_of(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What every stage was started with, inputs before what needs them."""
    requests: dict[str, dict[str, Any]] = {}
    for file in sorted(run_dir.glob(f"*/{REQUEST}")):
        request: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(file))  # type: ignore[assignment]
        requests[file.parent.name] = request
    graph = {
        name: {Path(spec["directory"]).name for spec in request["inputs"].values()
               if Path(spec["directory"]).parent == run_dir}
        for name, request in requests.items()
    }  # fmt: skip
    return {
        n: requests[n] for n in graphlib.TopologicalSorter(graph).static_order() if n in requests
    }


def read_run(run_dir: Path) -> list[StageState]:
    """The state of every stage of a run; refuses where Slurm has its jobs and does not answer.

    Not of one that was only planned, and is no longer.
    """
    jobs = read_jobs(run_dir)
    queue = job_states(jobs.values())
    held = lock.holder(run_dir)
    planned = planned_stages(run_dir)
    return [
        _state(run_dir / name, request, jobs.get(name), queue, held)
        for name, request in requests_of(run_dir).items()
        if planned is None or name in planned or name in jobs or _was_started(run_dir / name)
    ]


def _was_started(stage_dir: Path) -> bool:
    return newest_log(stage_dir) is not None or any(
        (stage_dir / name).exists() for name in (WORK, MANIFEST)
    )


def _state(
    stage_dir: Path,
    request: Mapping[str, object],
    job: SlurmJob | None,
    queue: Mapping[str, JobState],
    held: lock.Holder | None,
) -> StageState:
    name = stage_dir.name
    queued = queue.get(job.id) if job else None
    if job and queued and queued.active:
        if queued.state == "PENDING":
            why = queued.reason if queued.reason not in ("", "None") else "is about to start"
            return StageState(name, PENDING, _with_progress(why, stage_dir), job)
        limit = f"{queued.time_left} to its limit on {queued.nodes}"
        return StageState(name, RUNNING, _with_progress(limit, stage_dir), job)
    if held and held.stage == name:
        return StageState(name, RUNNING, progress(stage_dir / METRICS) or "")
    manifest = read_manifest(stage_dir)
    if manifest is not None and manifest.fingerprint == request["fingerprint"]:
        return StageState(name, COMPLETE, f"{manifest.seconds:.0f} s", job, manifest)
    if held and held.stage:
        return StageState(name, PENDING, f"after {held.stage}")
    if job and job.fingerprint == request["fingerprint"]:
        ended = queued.state if queued else final_state(job)
        return _ended(stage_dir, job, ended)
    return _ended(stage_dir, None, None)


def _ended(stage_dir: Path, job: SlurmJob | None, ended: str | None) -> StageState:
    """A stage that is not complete and that nothing works on."""
    name, log = stage_dir.name, newest_log(stage_dir)
    if (stage_dir / WORK / STOPPED).exists():
        return StageState(name, STOPPED_STATE, reason(stage_dir, log), job)
    why = ENDED_BY_SLURM.get((ended or "").rstrip("+"))
    if (ended or "").startswith("CANCELLED"):
        return StageState(name, CANCELLED, "the same command submits it again", job)
    if why:
        return StageState(name, FAILED, f"{ended}: {why}", job)
    how = f"{ended}: " if ended else ""
    if (job and log and log.stem == job.id) or (stage_dir / WORK / ERROR).exists():
        return StageState(name, FAILED, how + reason(stage_dir, log), job)
    if job:
        # With --kill-on-invalid-dep Slurm removes what waits for a job that failed, and forgets it.
        note = "its job never started: cancelled, or a stage before it did not succeed"
        return StageState(name, CANCELLED, note, job)
    if unfinished(stage_dir) is not None:
        return StageState(name, STOPPED_STATE, _with_progress("was interrupted", stage_dir))
    if (stage_dir / MANIFEST).exists():
        return StageState(name, NOT_RUN, "its result is of other settings, inputs or code")
    return StageState(name, NOT_RUN)


def _with_progress(text: str, stage_dir: Path) -> str:
    done = progress(stage_dir / METRICS)
    return f"{done}; {text}" if done else text


def progress(metrics: Path) -> str | None:
    """How far a stage is and how long it will still take, from its last records."""
    records = _progress_records(metrics)
    if not records:
        return None
    last = records[-1]
    text = f"{last['task']} {last['done']}/{last['total']}"
    left = seconds_left(records)
    return f"{text}, {in_words(left)} left" if left else text


def _progress_records(metrics: Path) -> list[Record]:
    return [record for record in read_records(metrics) if "task" in record]


def run_left(run_dir: Path, states: Sequence[StageState]) -> float | None:
    """Seconds that a run will still take; ``None`` if it is complete, or no plan knows that."""
    planned = planned_seconds(run_dir)
    ahead = [stage for stage in states if stage.state != COMPLETE]
    if not planned or not ahead:
        return None
    expected = Expected(planned, {s.name: s.manifest.seconds for s in states if s.manifest})
    left = 0.0
    for stage in ahead:
        begun = stage.state in (RUNNING, STOPPED_STATE)
        records = _progress_records(run_dir / stage.name / METRICS) if begun else []
        own = seconds_left(records) if records else None
        left += expected.seconds([stage.name]) if own is None else own
    return left
