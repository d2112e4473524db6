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

JOB = SlurmJob("run.prune.01234567", "prune", "7", "1@east", "a")


def test_times_are_parsed_as_slurm_parses_them() -> None:
    assert slurm_seconds("04:00:00") == 4 * 3600
    assert slurm_seconds("2-01:02:03") == 2 * 86400 + 3600 + 123
    for text in ("", "4", "1:2", "00:60:00", "1-00", "-01:00:00", "04:00:00 "):
        assert list(violations(Resources(time=text)))


def test_only_the_newest_job_of_a_stage_is_read(tmp_path: Path) -> None:
    # The last line is not complete, as after a kill.
    rows = ("prune 7 1@east a", "distill 8 1@east b", "prune 9 1@east c")
    lines = (f"{job} {run_hash(tmp_path)}\n" for job in rows)
    (tmp_path / "jobs.txt").write_text("".join(lines) + "distill 1")
    jobs = read_jobs(tmp_path)
    assert {stage: job.id for stage, job in jobs.items()} == {"prune": "9", "distill": "8"}
    assert jobs["prune"].name == job_name(tmp_path, "prune") != jobs["distill"].name
    (copy := tmp_path / "copy").mkdir()
    (copy / "jobs.txt").write_bytes((tmp_path / "jobs.txt").read_bytes())
    assert read_jobs(copy) == read_jobs(tmp_path / "elsewhere") == {}


def test_no_answer_of_slurm_is_an_error_and_not_an_empty_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    answer = "echo 'slurm_load_jobs error: {}' >&2; exit 1"
    write_program(tmp_path / "bin" / "squeue", answer.format("Unable to contact"))
    with pytest.raises(RecipeError, match=r"squeue does not answer: .*Unable to contact"):
        job_states([JOB])
    write_program(tmp_path / "bin" / "squeue", answer.format("Invalid job id specified"))
    assert job_states([JOB]) == {}


def test_a_job_with_the_same_id_and_another_name_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake Slurm has job 7 of another run, as another cluster may have."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    answers = {"squeue": "7|RUNNING|None|1:00|n1", "sacct": "7|FAILED"}
    for name, row in answers.items():
        by_name = (
            f'case "$*" in *--name=*) [[ "$*" = *--name=other* ]] || exit 0;; esac; echo "{row}"'
        )
        write_program(tmp_path / "bin" / name, by_name)
    assert job_states([JOB]) == final_states([JOB]) == {}
    other = replace(JOB, name="other")
    assert job_states([other])["7"].running
    assert final_states([other])["7"].state == "FAILED"


def test_jobs_that_slurm_may_hide_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may run: of another user if Slurm hides these, or on another cluster."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    write_program(tmp_path / "bin" / "scontrol", "echo 'ClusterName             = east'")
    write_program(tmp_path / "bin" / "squeue", "exit 0")
    uid = os.getuid()
    assert owner() == f"{uid}@east"
    for job_owner, final, refused in (
        (f"{uid}@east", "", False),
        (f"{uid + 1}@east", "", True),
        (f"{uid}@west", "", True),
        (f"{uid}@west", "7|COMPLETED", False),
    ):
        (tmp_path / "jobs.txt").write_text(f"prune 7 {job_owner} a {run_hash(tmp_path)}\n")
        write_program(tmp_path / "bin" / "sacct", f"echo '{final}'")
        with pytest.raises(RecipeError, match="job 7") if refused else nullcontext():
            assert active_jobs(tmp_path) == {}
