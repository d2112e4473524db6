"""Tests how a run's files determine the states of stages, and the order of writing the files."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest

from recipes.core import stage_process
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import ARTIFACT, MANIFEST, WORK, read_manifest, stamp_files
from recipes.core.metrics import METRICS, MetricsLog, read_records, result_metrics
from recipes.core.run_state import (
    BEGUN,
    OUTCOME,
    REQUEST,
    RUN_FILE,
    InputRef,
    LastPlan,
    Request,
    Status,
    begin_work,
    complete_stage,
    last_end,
    read_last_plan,
    read_request,
    record_failure,
    stage_state,
    stage_states,
)
from recipes.core.stage import DEADLINE, StoppedByDeadlineError
from recipes.core.watchdog import STACKS
from recipes.pruning.settings import PruneConfig
from tests.support.launcher import write_program
from tests.support.manifests import bare_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from recipes.core.manifest import Manifest

HUNG = 'Thread 0x1 (most recent call first):\n  File "a.py", line 7 in wait\n'
"""The stack that the watchdog writes to a file for each rank if the stage hangs."""


def start_manifest(fingerprint: str = "f", at: str = "10:00") -> Manifest:
    """Returns the manifest of a start (an attempt to run a stage) at a UTC time, without result."""
    manifest = bare_manifest("a", "dataset", None)
    started_at = f"2025-01-01T{at}:00+00:00"
    return replace(manifest, fingerprint=fingerprint, started_at=started_at, seconds=0.0)


def write_failed_work(stage: Path) -> Path:
    """Writes the files of a failed start, and returns the path of its checkpoint."""
    begin_work(stage, start_manifest())
    (stage / WORK / ARTIFACT / "half").touch()  # a file of an unfinished artifact
    record_failure(stage, "old")
    MetricsLog(stage / METRICS).progress("train", 1, 2)
    checkpoint = stage / WORK / "checkpoints" / "step_1"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    return checkpoint


def write_result(stage: Path) -> None:
    """Writes a complete stage with an empty artifact and the fingerprint "f"."""
    begin_work(stage, start_manifest())
    complete_stage(stage, start_manifest())


def test_the_files_determine_the_state(tmp_path: Path) -> None:
    stage, work = tmp_path / "stage", tmp_path / "stage" / WORK

    def status() -> Status:
        return stage_state(stage, "f").status  # all starts below have the fingerprint "f"

    stage.mkdir()
    assert status() is Status.NOT_STARTED
    begin_work(stage, start_manifest())
    assert status() is Status.INTERRUPTED
    record_failure(stage, "no memory")
    assert (status(), stage_state(stage).error) == (Status.FAILED, "no memory")
    record_failure(stage, "at step 1", stopped=True)
    assert (status(), stage_state(stage).error) == (Status.STOPPED, "at step 1")
    (work / STACKS.format(3)).write_text(HUNG)  # stacks of rank 3
    assert status() is Status.HUNG
    assert "rank 3: a.py, line 7, in wait" in stage_state(stage).error
    begin_work(stage, start_manifest())
    assert status() is Status.INTERRUPTED
    complete_stage(stage, start_manifest())
    assert status() is Status.COMPLETE
    assert not work.exists()
    stale = stage_state(stage, "g")
    assert (stale.status, stale.result) == (Status.NOT_STARTED, read_manifest(stage))


def test_a_result_stays_complete_while_another_start_fails(tmp_path: Path) -> None:
    write_result(tmp_path)
    begin_work(tmp_path, start_manifest(at="11:00"))
    record_failure(tmp_path, "no memory")
    assert stage_state(tmp_path, "f").status is Status.COMPLETE
    assert last_end(tmp_path) == (Status.FAILED, "no memory")
    assert stage_state(tmp_path, "g").status is Status.FAILED


def test_a_result_keeps_its_metrics_until_another_result_replaces_it(tmp_path: Path) -> None:
    def train(at: str, step: int) -> None:
        # The time is also the fingerprint, so no start resumes the work of another one.
        begin_work(tmp_path, start_manifest(fingerprint=at, at=at))
        MetricsLog(tmp_path / METRICS).progress("train", step, 9)

    def steps() -> list[int]:
        return [record["done"] for record in read_records(result_metrics(tmp_path))]

    train("10:00", 1)
    complete_stage(tmp_path, start_manifest("10:00", "10:00"))
    train("11:00", 2)
    assert steps() == [1]
    train("12:00", 3)
    assert steps() == [1]
    complete_stage(tmp_path, start_manifest("12:00", "12:00"))
    assert steps() == [3]


def test_work_of_other_settings_that_cannot_be_deleted_is_refused(tmp_path: Path) -> None:
    """Training would resume from its checkpoints."""
    stage, disk = tmp_path / "stage", tmp_path / "disk"
    (disk / "checkpoints").mkdir(parents=True)
    stage.mkdir()
    (stage / WORK).symlink_to(disk)
    with pytest.raises(RecipeError, match="cannot be deleted: it is a link"):
        begin_work(stage, start_manifest())


def test_a_childs_environment_keeps_other_paths_and_hidden_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{REPO_ROOT}{os.pathsep}/site/NeMo")
    assert stage_process._child_environment(1)["PYTHONPATH"] == os.environ["PYTHONPATH"]
    for visible, local_rank, expected in (
        ("4,5", "1", "5"),
        ("0", "1", "0"),  # two ranks on a CPU
        ("-1", "0", "-1"),
        ("", "0", ""),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert stage_process._child_environment(1)["CUDA_VISIBLE_DEVICES"] == expected


def test_the_first_error_stays_unless_a_later_error_may_overwrite_it(tmp_path: Path) -> None:
    begin_work(tmp_path, start_manifest())
    record_failure(tmp_path, "a bug", overwrite=False)
    record_failure(tmp_path, "lost its connection", overwrite=False)
    assert stage_state(tmp_path).error == "a bug"
    record_failure(tmp_path, "the text is bad")
    assert stage_state(tmp_path).error == "the text is bad"


def test_work_of_the_same_fingerprint_stays_without_its_partial_artifact(tmp_path: Path) -> None:
    checkpoint = write_failed_work(tmp_path)
    begin_work(tmp_path, start_manifest())
    assert list((tmp_path / WORK / ARTIFACT).iterdir()) == []
    assert checkpoint.exists()
    assert (tmp_path / METRICS).exists()
    assert last_end(tmp_path) is None


def test_work_of_another_fingerprint_is_deleted(tmp_path: Path) -> None:
    checkpoint = write_failed_work(tmp_path)
    begin_work(tmp_path, start_manifest("g"))
    assert not checkpoint.exists()
    assert not (tmp_path / METRICS).exists()
    assert stage_state(tmp_path).begun == start_manifest("g")


def test_seconds_of_continued_starts_are_summed(tmp_path: Path) -> None:
    """Each start counts until its last record. A start without records adds nothing."""

    def write_metrics_record(at: str) -> None:
        with (tmp_path / METRICS).open("a") as file:
            file.write(json.dumps({"time": datetime.fromisoformat(at).timestamp()}) + "\n")

    assert begin_work(tmp_path, start_manifest()).seconds == 0
    write_metrics_record("2025-01-01T10:01:30Z")
    assert begin_work(tmp_path, start_manifest(at="10:05")).seconds == 90
    write_metrics_record("2025-01-01T10:05:30Z")
    assert begin_work(tmp_path, start_manifest(at="10:10")).seconds == 90 + 30
    assert begin_work(tmp_path, start_manifest(at="10:20")).seconds == 120
    # Another fingerprint cannot continue the work.
    assert begin_work(tmp_path, start_manifest("g", at="10:30")).seconds == 0


def test_work_of_an_existing_result_is_leftover(tmp_path: Path) -> None:
    """A stage that is killed right after it wrote its manifest leaves work, which is not needed.

    A forced start deletes this work.
    """
    checkpoint = write_failed_work(tmp_path)
    # The result gets the manifest of this work, as if one start had made both.
    os.link(tmp_path / WORK / BEGUN, tmp_path / MANIFEST)
    state = stage_state(tmp_path, "f")
    assert (state.status, state.leftover, state.begun) == (Status.COMPLETE, True, None)
    (tmp_path / WORK / BEGUN).unlink()  # as if the kill came while work was deleted
    assert stage_state(tmp_path, "f").leftover
    begin_work(tmp_path, start_manifest(at="11:00"))
    assert not checkpoint.exists()
    state = stage_state(tmp_path, "f")
    assert (state.status, state.leftover) == (Status.COMPLETE, False)
    assert state.begun == start_manifest(at="11:00")


def test_half_deleted_work_cannot_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes after the work's manifest is deleted, and before its other files are."""
    checkpoint = write_failed_work(tmp_path)

    def simulate_kill(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recipes.core.run_state.shutil.rmtree", simulate_kill)
        with pytest.raises(KeyboardInterrupt):
            begin_work(tmp_path, start_manifest("g"))
    assert checkpoint.exists()
    assert stage_state(tmp_path).begun is None
    begin_work(tmp_path, start_manifest())  # the work has the same fingerprint, "f"
    assert not checkpoint.exists()


def test_a_new_result_replaces_the_old_one(tmp_path: Path) -> None:
    write_result(tmp_path)
    (tmp_path / ARTIFACT / "old").touch()
    begin_work(tmp_path, start_manifest(at="11:00"))
    (tmp_path / WORK / ARTIFACT / "new").touch()
    complete_stage(tmp_path, start_manifest(at="11:00"))
    assert [file.name for file in (tmp_path / ARTIFACT).iterdir()] == ["new"]
    with pytest.raises(FileNotFoundError):  # there is no work/artifact to publish
        complete_stage(tmp_path, start_manifest())
    # The old manifest is deleted first, because it must not describe another artifact.
    assert not (tmp_path / MANIFEST).exists()


def test_a_result_is_on_the_disk_before_the_work_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power failure could leave a manifest, truncated files and no checkpoints."""
    checkpoint = write_failed_work(tmp_path)
    artifact = tmp_path / WORK / ARTIFACT
    (artifact / "sub").mkdir()
    (artifact / "sub" / "weights").write_text("weights")
    (artifact / "outside").symlink_to("/proc/version")  # not synced, because fsync refuses it
    synced: list[str] = []
    fsync = os.fsync

    def fsync_and_record(descriptor: int) -> None:
        assert checkpoint.exists()
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync_and_record)
    files = stamp_files(artifact)  # hashes and syncs them
    names = "", "half", "sub", "sub/weights"  # "" is the folder of the artifact
    assert set(synced) == {str(artifact / name) for name in names}
    complete_stage(tmp_path, replace(start_manifest(), files=files))
    # A sync of the stage's directory saves the new names of the artifact and the manifest.
    assert synced[-1] == str(tmp_path)
    assert not checkpoint.exists()


@pytest.mark.parametrize("name", [BEGUN, OUTCOME])
def test_the_error_about_a_damaged_file_has_its_path(tmp_path: Path, name: str) -> None:
    write_failed_work(tmp_path)
    (tmp_path / WORK / name).write_text('{"finger')  # a truncated file
    with pytest.raises(RecipeError, match=str(tmp_path / WORK / name)):
        stage_state(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "- a", "a", "{", "format: 3\nrecipe: a", "format: 3\nrecipe: a\nstages: 1"]
)
def test_a_run_file_that_is_not_a_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(RecipeError, match=RUN_FILE):
        read_last_plan(tmp_path)


def test_a_request_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    ref = InputRef(tmp_path / "source", "dataset", "0123")
    # YAML must not read the fingerprint 1e5 as a number, nor "${" as the start of an interpolation.
    settings = {"stage": "a", "sizes": [1, 2.5e-7], "to": None, "env": {"HOME": "${HOME} é 1.0"}}
    request = Request("b", "1e5", "c", {"data": ref}, settings)
    request.write(tmp_path / "run" / "b")
    assert read_request(tmp_path / "run" / "b") == request
    file = tmp_path / "run" / "b" / REQUEST
    file.write_text(file.read_text().replace("format: 3", "format: 0"))
    with pytest.raises(RecipeError, match=rf"{file} .*format 0"):
        read_request(file.parent)


def test_stage_states_returns_planned_stages_then_started_stages(tmp_path: Path) -> None:
    assert read_last_plan(tmp_path) is None
    for name in ("a", "b", "dropped", "started"):
        Request(name, "f", "c", {}, {}).write(tmp_path / name)
    write_result(tmp_path / "b")
    write_result(tmp_path / "started")
    # Stage "never" has no fingerprint and no directory. Stage "dropped" is no longer planned. The
    # result of "b" is stale, because it has the fingerprint "f" instead of "1e5".
    plan = LastPlan("r", {"b": "1e5", "a": "f", "never": None})
    plan.write(tmp_path)
    assert read_last_plan(tmp_path) == plan
    statuses = {name: state.status for name, state in stage_states(tmp_path).items()}
    expected = {"b": Status.NOT_STARTED, "a": Status.NOT_STARTED, "started": Status.COMPLETE}
    # Compares lists, because the order matters.
    assert list(statuses.items()) == list(expected.items())
    assert "dropped" in stage_states(tmp_path, include=["dropped"])


def test_a_child_that_stops_at_the_deadline_stops_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_child(name: str, stage_dir: Path, *_: object) -> None:
        """Replaces ``run_to_end``. Reads ``stopped`` of the loop below."""
        (stage_dir / WORK).mkdir()
        record_failure(stage_dir, "at step 1", stopped=stopped)
        raise RecipeError(f"{name} failed", "see the log")

    monkeypatch.setattr(stage_process, "run_to_end", fail_child)
    for stopped in (True, False):  # whether the child stopped at its deadline
        with pytest.raises(RecipeError) as error:
            stage_process.run_child(
                PruneConfig(stage="prune"), tmp_path / str(stopped) / "prune", {}
            )
        assert isinstance(error.value, StoppedByDeadlineError) == stopped
    monkeypatch.setenv(DEADLINE, "1")  # seconds since 1970, so the deadline has passed
    with pytest.raises(StoppedByDeadlineError):
        stage_process.run_child(PruneConfig(stage="prune"), tmp_path / "late" / "prune", {})
    assert not (tmp_path / "late").exists()  # the child was not started


def test_a_child_with_one_device_is_not_a_rank_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child of a search must not act as one of the Slurm tasks in which the search runs.

    So it gets rank 0, and a job name with which Lightning ignores Slurm's tasks.
    """
    program, child = tmp_path / "python", tmp_path / "prune"
    write_program(program, "env")  # replaces Python, and prints its environment to the child's log
    monkeypatch.setattr(sys, "executable", str(program))
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "batch", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError):  # the program writes no result
        stage_process.run_child(PruneConfig(stage="prune"), child, {})
    [log] = (child / stage_process.LOGS).iterdir()
    assert {"SLURM_JOB_NAME=interactive", "RANK=0"} <= set(log.read_text().splitlines())
