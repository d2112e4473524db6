"""The record of jobs, the format of time limits, and what happens if Slurm does not answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.slurm_queue import SlurmJob, job_states, read_jobs, run_hash
from recipes.core.constraints import violations
from recipes.core.errors import RecipeError
from recipes.core.stage import Resources
from recipes.planning.limits import slurm_seconds
from tests.support.launcher import write_program


def test_times_are_parsed_as_slurm_parses_them() -> None:
    assert slurm_seconds("04:00:00") == 4 * 3600
    assert slurm_seconds("2-01:02:03") == 2 * 86400 + 3600 + 123
    for text in ("", "4", "1:2", "00:60:00", "1-00", "-01:00:00", "04:00:00 "):
        assert list(violations(Resources(time=text)))


def test_only_the_newest_job_of_a_stage_is_read(tmp_path: Path) -> None:
    # The last line is not complete, as after a kill.
    lines = (f"{job} {run_hash(tmp_path)}\n" for job in ("prune 7 a", "distill 8 b", "prune 9 c"))
    (tmp_path / "jobs.txt").write_text("".join(lines) + "distill 1")
    jobs = (SlurmJob("prune", "9", "c"), SlurmJob("distill", "8", "b"))
    assert read_jobs(tmp_path) == {job.stage: job for job in jobs}
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
        job_states([SlurmJob("prune", "7", "a")])
    write_program(tmp_path / "bin" / "squeue", answer.format("Invalid job id specified"))
    assert job_states([SlurmJob("prune", "7", "a")]) == {}
