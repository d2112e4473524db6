"""The record of jobs, the format of time limits, and what happens if Slurm does not answer."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm_queue import (
    SlurmJob,
    active_jobs,
    final_states,
    job_name,
    job_states,
    owner,
    read_jobs,
    run_hash,
)
from recipes.core.constraints import violations
from recipes.core.errors import RecipeError
from recipes.core.stage import Resources
from recipes.planning.limits import slurm_seconds
from tests.support.launcher import write_program

JOB = SlurmJob(name="run.prune.01234567", stage="prune", id="7", owner="1@east", fingerprint="a")
"""The owner is ``UID@CLUSTER``."""


def test_times_are_parsed_as_slurm_parses_them() -> None:
    assert slurm_seconds("04:00:00") == 4 * 3600
    assert slurm_seconds("2-01:02:03") == 2 * 86400 + 3600 + 2 * 60 + 3


def test_other_formats_of_time_limits_are_refused() -> None:
    for text in ("", "4", "1:2", "00:60:00", "1-00", "-01:00:00", "04:00:00 "):
        assert list(violations(Resources(time=text)))


def test_only_the_newest_job_of_a_stage_is_read(tmp_path: Path) -> None:
    # Columns: stage, job id, owner, the stage's fingerprint, run hash. The last line is incomplete,
    # as if its writer was killed.
    rows = ("prune 7 1@east a", "distill 8 1@east b", "prune 9 1@east c")
    lines = (f"{row} {run_hash(tmp_path)}\n" for row in rows)
    (tmp_path / "jobs.txt").write_text("".join(lines) + "distill 1")
    jobs = read_jobs(tmp_path)
    assert {stage: job.id for stage, job in jobs.items()} == {"prune": "9", "distill": "8"}
    assert jobs["prune"].name == job_name(tmp_path, "prune")
    assert jobs["prune"].name != jobs["distill"].name
    # A copy of the run has another run hash, so the jobs do not count as its own.
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "jobs.txt").write_bytes((tmp_path / "jobs.txt").read_bytes())
    assert read_jobs(copy) == {}
    assert read_jobs(tmp_path / "no such run") == {}


def test_a_failed_squeue_is_an_error_and_not_an_empty_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    failure = "echo 'slurm_load_jobs error: {}' >&2; exit 1"
    write_program(tmp_path / "bin" / "squeue", failure.format("Unable to contact"))
    with pytest.raises(RecipeError, match=r"squeue does not answer: .*Unable to contact"):
        job_states([JOB])
    # squeue fails with this message, too, if Slurm has forgotten a job that has ended.
    write_program(tmp_path / "bin" / "squeue", failure.format("Invalid job id specified"))
    assert job_states([JOB]) == {}


def test_a_job_with_the_same_id_and_another_name_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake Slurm has a job 7 with the name ``other``, as another cluster may have."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    outputs = {"squeue": "7|RUNNING|None|1:00|n1", "sacct": "7|FAILED"}
    for program, row in outputs.items():
        # Prints the row with --name=other and without --name, and nothing with another name.
        script = f'case "$*" in *--name=other*) ;; *--name=*) exit 0;; esac; echo "{row}"'
        write_program(tmp_path / "bin" / program, script)
    assert job_states([JOB]) == final_states([JOB]) == {}
    other = replace(JOB, name="other")
    assert job_states([other])["7"].running
    assert final_states([other])["7"].state == "FAILED"


def test_commands_are_refused_while_slurm_may_hide_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unlisted job may still run if another user owns it, or if it is on another cluster."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    write_program(tmp_path / "bin" / "scontrol", "echo 'ClusterName             = east'")
    write_program(tmp_path / "bin" / "squeue", "exit 0")  # lists no job
    uid = os.getuid()
    assert owner() == f"{uid}@east"
    for job_owner, sacct_row, refused in (
        (f"{uid}@east", "", False),  # squeue would list the job, so it has ended
        (f"{uid + 1}@east", "", True),
        (f"{uid}@west", "", True),
        (f"{uid}@west", "7|COMPLETED", False),
    ):
        (tmp_path / "jobs.txt").write_text(f"prune 7 {job_owner} a {run_hash(tmp_path)}\n")
        write_program(tmp_path / "bin" / "sacct", f"echo '{sacct_row}'")
        with pytest.raises(RecipeError, match="job 7") if refused else nullcontext():
            assert active_jobs(tmp_path) == {}
