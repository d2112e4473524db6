"""The jobs of a run, and their states in Slurm."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from recipes.core.errors import RecipeError

RECORD = "jobs.txt"
"""File in the run directory with a line ``STAGE JOB FINGERPRINT`` for every submitted job."""
ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY")
) | {"PREEMPTED", "REVOKED", "TIMEOUT"}
STATE_REASONS = {
    "CANCELLED": "it was cancelled; the same command submits it again",
    "NODE_FAIL": "one of its nodes failed; the same command submits it again",
    "OUT_OF_MEMORY": "it took more memory than it requested: see cluster.sbatch",
    "PREEMPTED": "another job took its nodes; the same command submits it again",
    "TIMEOUT": "it reached its time limit; the same command submits it again, and it resumes",
}
"""Why Slurm ended a job. Logs do not tell: the job's ranks only lost their connections."""
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class SlurmJob:
    """A job that was submitted for a stage."""

    stage: str
    id: str
    fingerprint: str


@dataclass(frozen=True)
class JobState:
    """A job in Slurm's queue; ``reason`` is why it waits, ``time_left`` the time to its limit."""

    state: str
    reason: str = ""
    time_left: str = ""
    nodes: str = ""

    @property
    def active(self) -> bool:
        """Whether it runs or will run."""
        return self.state not in ENDED


def read_jobs(run_dir: Path) -> dict[str, SlurmJob]:
    """Returns the newest job of every stage for which one was submitted."""
    try:
        text = (run_dir / RECORD).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: SlurmJob(*row) for row in rows if len(row) == 3}


def job_states(jobs: Iterable[SlurmJob]) -> dict[str, JobState]:
    """Returns the states of jobs that Slurm remembers, by job id; raises if it does not answer."""
    ids = [job.id for job in jobs]
    if not ids or shutil.which("squeue") is None:  # a run copied to a machine without Slurm
        return {}
    # Slurm forgets a job minutes after its end. A list of one unknown id is then an error.
    columns = "--format=%i|%T|%r|%L|%N"
    done = query("squeue", "--noheader", "--states=all", columns, f"--jobs={','.join(ids)}")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise RecipeError(
            f"squeue does not answer: {done.stderr.strip()}", "try again once Slurm is up"
        )
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return {row[0]: JobState(*row[1:]) for row in rows if len(row) == 5}


def final_state(job: SlurmJob) -> str | None:
    """Returns the last state of a job that left the queue; ``None`` without Slurm's accounting."""
    done = query("sacct", "--noheader", "--parsable2", "-X", "--format=State", f"--jobs={job.id}")
    states = done.stdout.split()
    return states[0] if done.returncode == 0 and states else None


def active_jobs(run_dir: Path) -> Mapping[str, tuple[SlurmJob, JobState]]:
    """Returns the jobs of a run that run or wait, by stage."""
    jobs = read_jobs(run_dir)
    states = job_states(jobs.values())
    return {
        name: (job, state)
        for name, job in jobs.items()
        if (state := states.get(job.id)) is not None and state.active
    }


def cancel_jobs(jobs: Iterable[SlurmJob]) -> None:
    """Cancels jobs; raises ``RecipeError`` if Slurm refuses."""
    ids = [job.id for job in jobs]
    done = query("scancel", *ids)
    if done.returncode:
        raise RecipeError(
            f"scancel failed: {done.stderr.strip()}",
            f"as the user who submitted them: scancel {' '.join(ids)}",
        )


def query(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of Slurm; a command that is missing or does not answer fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"there is no {command[0]} here")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]} did not answer")
