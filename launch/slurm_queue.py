"""The jobs of a run, and their states in Slurm."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.files import write_text_atomically
from recipes.core.run_state import Status, stage_state
from recipes.core.screen import screen

RECORD = "jobs.txt"
"""File in a run directory with a line ``STAGE JOB_ID OWNER FINGERPRINT RUN_HASH`` for each job. The
functions ``owner`` and ``run_hash`` return the words OWNER and RUN_HASH."""
ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY")
) | {"PREEMPTED", "REVOKED", "TIMEOUT"}
"""States of jobs that have ended."""
RUNNING = frozenset(
    ("COMPLETING", "RESIZING", "RUNNING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED")
)
"""States of jobs that have started and not ended. A job in any other state waits."""
WAIT_REASONS = {
    "CONFIGURING": "its nodes are being prepared",
    "REQUEUE_HOLD": "held after a requeue, until scontrol release",
    "REQUEUED": "about to start again",
    "SPECIAL_EXIT": "held after an error, until scontrol release",
}
"""Why a job in one of these states waits. For PENDING jobs, Slurm itself gives a reason."""
STATE_REASONS = {
    "CANCELLED": "it was cancelled; repeat the command of the run to submit it again",
    "NODE_FAIL": "one of its nodes failed; repeat the command of the run to submit it again",
    "OUT_OF_MEMORY": "it took more memory than it requested: see cluster.sbatch",
    "PREEMPTED": "another job took its nodes; repeat the command of the run to submit it again",
    "TIMEOUT": "it reached its time limit; repeat the command of the run to resume it",
}
"""Why a job in one of these states ended. Its log does not show the reason."""
TIMEOUT_SECONDS = 60
"""Maximum run time of a Slurm program, such as squeue."""
POLL_SECONDS = 2.0
"""Time between two requests for the states of jobs."""
MAX_COMPLETING_SECONDS = 300.0
"""How long to wait for jobs in the state COMPLETING, in which Slurm kills a job's processes."""


@dataclass(frozen=True)
class SlurmJob:
    """A job that was submitted for a stage."""

    name: str
    """Name in Slurm. No other stage and no other run has it."""
    stage: str
    id: str
    owner: str
    """``UID@CLUSTER``: the user who submitted the job, and the cluster that has it."""
    fingerprint: str
    """The stage's fingerprint when the job was submitted."""


@dataclass(frozen=True)
class JobState:
    """A job's state in Slurm. sacct sets only ``state``, squeue sets all fields."""

    state: str
    reason: str = ""
    """Why the job waits; "None" if Slurm gives no reason."""
    time_left: str = ""
    """Time until the job's time limit."""
    nodes: str = ""

    @property
    def active(self) -> bool:
        """Whether the job runs or will run."""
        return self.state not in ENDED

    @property
    def running(self) -> bool:
        """Whether the job has started and not ended."""
        return self.state in RUNNING

    @property
    def description(self) -> str:
        """Says why the job waits, or where it runs and how much time it has left."""
        if self.running:
            # squeue shows these words instead of a time if there is no limit.
            limited = self.time_left not in ("", "UNLIMITED", "NOT_SET", "INVALID")
            limit = f"{self.time_left} until its time limit" if limited else "without a time limit"
            return f"on {self.nodes}, {limit}"
        slurm_reason = self.reason if self.reason not in ("", "None") else "is about to start"
        return WAIT_REASONS.get(self.state, slurm_reason)


def run_hash(run_dir: Path) -> str:
    """Returns a short hash of a run's path. A copy of the run has another path, so another hash."""
    return hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]


def job_name(run_dir: Path, stage: str) -> str:
    """Returns the name of a stage's jobs, which no other stage and no other run has."""
    return f"{run_dir.name}.{stage}.{run_hash(run_dir)}"


def owner() -> str:
    """Returns ``UID@CLUSTER`` of jobs that this user submits here; without Slurm, only ``UID@``."""
    config = query("scontrol", "show", "config").stdout
    return f"{os.getuid()}@{''.join(re.findall(r'^ClusterName *= (.+)', config, re.M))}"


def read_jobs(run_dir: Path) -> dict[str, SlurmJob]:
    """Returns each stage's newest job, by stage; a copied run has none of the original's jobs."""
    try:
        text = (run_dir / RECORD).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    rows = [line.split() for line in text.splitlines()]
    # A stage's last line counts. An incomplete line has no ``RUN_HASH``, so it is ignored, too.
    return {
        row[0]: SlurmJob(job_name(run_dir, row[0]), *row[:4])
        for row in rows
        if row[4:] == [run_hash(run_dir)]
    }


def forget_job(run_dir: Path, stage: str) -> None:
    """Removes a stage's jobs from ``RECORD``, before the stage runs without Slurm."""
    if stage in read_jobs(run_dir):
        lines = (run_dir / RECORD).read_text(encoding="utf-8").splitlines()
        other_lines = [f"{line}\n" for line in lines if line.split()[:1] != [stage]]
        write_text_atomically(run_dir / RECORD, "".join(other_lines))


def job_states(jobs: Iterable[SlurmJob]) -> dict[str, JobState]:
    """Returns the states of the jobs that Slurm remembers, by job id.

    Selects jobs by id and name, because another cluster may have other jobs with these ids. Raises
    ``RecipeError`` if squeue fails.
    """
    names_by_id = {job.id: job.name for job in jobs}
    # A run may have been copied to a machine without Slurm.
    if not names_by_id or shutil.which("squeue") is None:
        return {}
    columns = "--format=%i|%T|%r|%L|%N"  # the id, then the fields of ``JobState`` in their order
    selection = (f"--jobs={','.join(names_by_id)}", f"--name={','.join(names_by_id.values())}")
    squeue = query("squeue", "--noheader", "--states=all", columns, *selection)
    # Slurm forgets a job minutes after its end. If squeue is asked only for a forgotten job, it
    # fails with this message, which is no error here.
    if squeue.returncode and "Invalid job id" not in squeue.stderr:
        raise RecipeError(
            f"squeue does not answer: {squeue.stderr.strip()}", "try again once Slurm is up"
        )
    rows = [line.split("|") for line in squeue.stdout.splitlines()]
    return {row[0]: JobState(*row[1:]) for row in rows if len(row) == 5}


def final_states(jobs: Iterable[SlurmJob]) -> dict[str, JobState]:
    """Returns the states of the jobs that have ended according to sacct, by job id."""
    names_by_id = {job.id: job.name for job in jobs}
    if not names_by_id:
        return {}
    # With -X, sacct omits the steps of jobs.
    selection = (f"--jobs={','.join(names_by_id)}", f"--name={','.join(names_by_id.values())}")
    sacct = query("sacct", "--noheader", "--parsable2", "-X", "--format=JobID,State", *selection)
    rows = [line.split("|") for line in sacct.stdout.splitlines()]
    # A state can be "CANCELLED by 1000", or "CANCELLED+" if sacct cuts it off.
    states = {row[0]: JobState(row[1].split()[0].rstrip("+")) for row in rows if len(row) == 2}
    return {job_id: state for job_id, state in states.items() if not state.active}


def active_jobs(run_dir: Path) -> Mapping[str, tuple[SlurmJob, JobState]]:
    """Returns the jobs of a run that run or wait, and their states, by stage.

    Raises:
        RecipeError: A job of an incomplete stage is possibly active, but Slurm does not show it:
            this machine has no Slurm or another cluster's, or the job belongs to another user.
    """
    jobs = read_jobs(run_dir)
    states = job_states(jobs.values())
    unlisted = [
        job
        for name, job in jobs.items()
        if job.id not in states
        and stage_state(run_dir / name, job.fingerprint).status is not Status.COMPLETE
    ]
    this_owner = owner() if unlisted else ""
    ended = final_states(job for job in unlisted if job.owner != this_owner)
    for job in unlisted:
        # squeue lists all active jobs of this owner, so this owner's unlisted jobs have ended.
        may_be_hidden = job.owner != this_owner or shutil.which("squeue") is None
        if may_be_hidden and job.id not in ended:
            raise RecipeError(
                f"job {job.id} of {job.owner} (user@cluster) may run {job.stage} of {run_dir}, "
                f"but Slurm does not show it to {this_owner}.",
                "repeat the command as that user on that cluster; "
                f"if no job runs, delete {run_dir / RECORD}",
            )
    return {
        name: (job, state)
        for name, job in jobs.items()
        if (state := states.get(job.id)) is not None and state.active
    }


def wait_for_completing_jobs(run_dir: Path) -> Mapping[str, tuple[SlurmJob, JobState]]:
    """Waits until no job of a run is COMPLETING; then returns ``active_jobs`` of the run.

    Raises:
        RecipeError: A job does not end within ``MAX_COMPLETING_SECONDS``.
    """
    active = active_jobs(run_dir)
    deadline: float | None = None
    while ids := [job.id for job, state in active.values() if state.state == "COMPLETING"]:
        if deadline is None:  # the first time
            screen().print(f"waiting until Slurm has ended job {', '.join(ids)}")
            deadline = time.monotonic() + MAX_COMPLETING_SECONDS
        elif time.monotonic() > deadline:
            raise RecipeError(
                f"Slurm does not end job {', '.join(ids)}, which is completing.",
                f"repeat the command when scontrol show job {ids[0]} says that it has ended",
            )
        time.sleep(POLL_SECONDS)
        active = active_jobs(run_dir)
    return active


def cancel_jobs(jobs: Iterable[SlurmJob]) -> None:
    """Cancels jobs; raises ``RecipeError`` if Slurm refuses."""
    ids = [job.id for job in jobs]
    scancel = query("scancel", *ids)
    if scancel.returncode:
        raise RecipeError(
            f"scancel failed: {scancel.stderr.strip()}",
            f"as the user who submitted the jobs, run scancel {' '.join(ids)}",
        )


def query(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a Slurm program. If it is missing or hangs, the returned exit status is not 0."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"there is no {command[0]} here")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]} did not answer")
