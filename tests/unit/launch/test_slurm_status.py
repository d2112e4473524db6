"""Statuses of stages, derived from the output of a fake squeue and a fake sacct."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from launch.executors.local import run_all
from launch.plan import Plan
from launch.progress import Follower
from launch.run_status import read_statuses
from launch.slurm_queue import RECORD, active_jobs, owner, read_jobs, run_hash
from recipes.core.errors import RecipeError
from recipes.core.stage_process import LOGS
from tests.support.launcher import write_program
from tests.unit.conftest import write_last_plan

if TYPE_CHECKING:
    from tests.unit.conftest import Complete, MakePlan

StatusOf = Callable[..., tuple[str, str]]
"""Returns the status and the detail of the first stage, see the fixture ``status``."""
AGAIN = "repeat the command of the run to submit it again"


@pytest.fixture
def planned(plan: MakePlan) -> Plan:
    """A plan whose stages were submitted as jobs 0, 1, 2 …"""
    planned = plan()
    write_last_plan(planned)
    run = run_hash(planned.run_dir)
    lines = [
        f"{stage.name} {job_id} {owner()} {stage.fingerprint} {run}\n"
        for job_id, stage in enumerate(planned.stages)
    ]
    (planned.run_dir / RECORD).write_text("".join(lines))
    return planned


@pytest.fixture
def status(planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StatusOf:
    """Returns a function that reads the first stage's status and detail.

    Its arguments are the outputs of squeue and sacct. Each call of sacct adds a line to ``calls``.
    """
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    def status_of(squeue: str = "", sacct: str = "") -> tuple[str, str]:
        write_program(tmp_path / "bin" / "squeue", f"printf '{squeue}'")
        write_program(tmp_path / "bin" / "sacct", f"echo >>{tmp_path}/calls; printf '{sacct}'")
        first, *_ = read_statuses(planned.run_dir)
        return str(first.status), first.detail

    return status_of


@pytest.mark.parametrize(
    ("row", "expected"),
    [  # a row has the state, the reason to wait, the remaining time and the nodes
        ("RUNNING|None|10:00|n1", ("running", "on n1, 10:00 until its time limit")),
        ("RUNNING|None|UNLIMITED|n1", ("running", "on n1, without a time limit")),
        ("COMPLETING|None|10:00|n1", ("running", "on n1, 10:00 until its time limit")),
        ("PENDING|Priority|10:00|", ("pending", "Priority")),
        ("PENDING|None|10:00|", ("pending", "is about to start")),
        ("CONFIGURING|None|10:00|n1", ("pending", "its nodes are being prepared")),
        (
            "REQUEUE_HOLD|job_requeued_in_held_state|10:00|",
            ("pending", "held after a requeue, until scontrol release"),
        ),
    ],
)
def test_jobs_in_the_queue(status: StatusOf, row: str, expected: tuple[str, str]) -> None:
    assert status(f"0|{row}\\n") == expected


@pytest.mark.parametrize(
    ("sacct", "expected"),
    [
        ("0|FAILED\\n", ("failed", "FAILED: it ended without a message or a log")),
        ("0|BOOT_FAIL\\n", ("failed", "BOOT_FAIL: it ended without a message or a log")),
        ("0|CANCELLED by 1000\\n", ("cancelled", AGAIN)),
        ("", ("cancelled", "its job never started: cancelled, or a stage before it failed")),
    ],
)
def test_jobs_that_left_the_queue_without_a_log(
    status: StatusOf, sacct: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    """One call of sacct reads the states of all jobs."""
    assert status(sacct=sacct) == expected
    assert (tmp_path / "calls").read_text() == "\n", "one line for each call"


def test_jobs_without_a_result_are_unknown_on_a_machine_without_slurm(
    planned: Plan, complete: Complete, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # neither squeue nor sacct is found
    with pytest.raises(RecipeError, match="job 0"):
        active_jobs(planned.run_dir)
    assert read_statuses(planned.run_dir)
    complete(planned)
    assert active_jobs(planned.run_dir) == {}


def test_a_local_start_after_a_job_decides_the_status(status: StatusOf, planned: Plan) -> None:
    """The local start removes the stage's job from the record of submitted jobs.

    So the state that sacct still has of this job no longer counts.
    """
    first = planned.stages[0]
    write_program(first.directory / "run.sh", "echo a local problem; exit 1")
    with pytest.raises(RecipeError):
        run_all(planned, lambda stage: Follower(stage, Console(file=StringIO())))
    assert first.name not in read_jobs(planned.run_dir)
    assert len(read_jobs(planned.run_dir)) == len(planned.stages) - 1
    assert status(sacct="0|CANCELLED by 0\\n")[0] != "cancelled"
    assert list((first.directory / LOGS).iterdir())
