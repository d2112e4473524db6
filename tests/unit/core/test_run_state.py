"""Tests how the files of a run determine states, and in which order the files are written."""

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
"""What the watchdog writes about a rank that hangs."""


def start_manifest(fingerprint: str = "f", at: str = "10:00") -> Manifest:
    """Returns the manifest of a start without a result."""
    manifest = bare_manifest("a", "dataset", None)
    started_at = f"2025-01-01T{at}:00+00:00"
    return replace(manifest, fingerprint=fingerprint, started_at=started_at, seconds=0.0)


def fail(stage: Path) -> Path:
    """Writes the unfinished work of a failed start, and returns its checkpoint."""
    begin_work(stage, start_manifest())
    (stage / WORK / ARTIFACT / "half").touch()
    record_failure(stage, "old")
    MetricsLog(stage / METRICS).progress("train", 1, 2)
    checkpoint = stage / WORK / "checkpoints" / "step_1"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    return checkpoint


def complete(stage: Path) -> None:
    begin_work(stage, start_manifest())
    complete_stage(stage, start_manifest())


def test_the_files_determine_the_state(tmp_path: Path) -> None:
    stage, work = tmp_path / "stage", tmp_path / "stage" / WORK

    def status() -> Status:
        return stage_state(stage, "f").status

    stage.mkdir()
    assert status() is Status.NOT_STARTED
    begin_work(stage, start_manifest())
    assert status() is Status.INTERRUPTED
    record_failure(stage, "no memory")
    assert (status(), stage_state(stage).error) == (Status.FAILED, "no memory")
    record_failure(stage, "at step 1", stopped=True)
    assert (status(), stage_state(stage).error) == (Status.STOPPED, "at step 1")
    (work / STACKS.format(3)).write_text(HUNG)
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
    complete(tmp_path)
    begin_work(tmp_path, start_manifest(at="11:00"))
    record_failure(tmp_path, "no memory")
    assert stage_state(tmp_path, "f").status is Status.COMPLETE
    assert last_end(tmp_path) == (Status.FAILED, "no memory")
    assert stage_state(tmp_path, "g").status is Status.FAILED


def test_a_result_keeps_its_metrics_until_another_result_replaces_it(tmp_path: Path) -> None:
    def train(at: str, step: int) -> None:
        begin_work(tmp_path, start_manifest(at, at))
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


def test_the_first_error_stays_unless_a_later_error_may_overwrite_it(tmp_path: Path) -> None:
    begin_work(tmp_path, start_manifest())
    record_failure(tmp_path, "a bug", overwrite=False)
    record_failure(tmp_path, "lost its connection", overwrite=False)
    assert stage_state(tmp_path).error == "a bug"
    record_failure(tmp_path, "the text is bad")
    assert stage_state(tmp_path).error == "the text is bad"


def test_work_of_the_same_fingerprint_stays_without_its_partial_artifact(tmp_path: Path) -> None:
    checkpoint = fail(tmp_path)
    begin_work(tmp_path, start_manifest())
    assert list((tmp_path / WORK / ARTIFACT).iterdir()) == []
    assert checkpoint.exists()
    assert (tmp_path / METRICS).exists()
    assert last_end(tmp_path) is None


def test_work_of_another_fingerprint_is_deleted(tmp_path: Path) -> None:
    checkpoint = fail(tmp_path)
    begin_work(tmp_path, start_manifest("g"))
    assert not checkpoint.exists()
    assert not (tmp_path / METRICS).exists()
    assert stage_state(tmp_path).begun == start_manifest("g")


def test_seconds_of_continued_starts_are_summed(tmp_path: Path) -> None:
    """Each start counts until its last record; a start without records adds nothing."""

    def write_record(at: str) -> None:
        with (tmp_path / METRICS).open("a") as file:
            file.write(json.dumps({"time": datetime.fromisoformat(at).timestamp()}) + "\n")

    assert begin_work(tmp_path, start_manifest()).seconds == 0
    write_record("2025-01-01T10:01:30Z")
    assert begin_work(tmp_path, start_manifest(at="10:05")).seconds == 90
    write_record("2025-01-01T10:05:30Z")
    assert begin_work(tmp_path, start_manifest(at="10:10")).seconds == 120
    assert begin_work(tmp_path, start_manifest(at="10:20")).seconds == 120
    assert begin_work(tmp_path, start_manifest("g", at="10:30")).seconds == 0


def test_work_of_an_existing_result_is_leftover(tmp_path: Path) -> None:
    """A kill after the manifest was written leaves work. A forced start deletes this work."""
    checkpoint = fail(tmp_path)
    # As if the start of this work had also written the result.
    os.link(tmp_path / WORK / BEGUN, tmp_path / MANIFEST)
    state = stage_state(tmp_path, "f")
    assert (state.status, state.leftover, state.begun) == (Status.COMPLETE, True, None)
    (tmp_path / WORK / BEGUN).unlink()
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
    checkpoint = fail(tmp_path)

    def be_killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recipes.core.run_state.shutil.rmtree", be_killed)
        with pytest.raises(KeyboardInterrupt):
            begin_work(tmp_path, start_manifest("g"))
    assert checkpoint.exists()
    assert stage_state(tmp_path).begun is None
    begin_work(tmp_path, start_manifest())
    assert not checkpoint.exists()


def test_a_new_result_replaces_the_old_one(tmp_path: Path) -> None:
    complete(tmp_path)
    (tmp_path / ARTIFACT / "old").touch()
    begin_work(tmp_path, start_manifest(at="11:00"))
    (tmp_path / WORK / ARTIFACT / "new").touch()
    complete_stage(tmp_path, start_manifest(at="11:00"))
    assert [file.name for file in (tmp_path / ARTIFACT).iterdir()] == ["new"]
    with pytest.raises(FileNotFoundError):  # there is no work/artifact to publish
        complete_stage(tmp_path, start_manifest())
    assert not (tmp_path / MANIFEST).exists()


def test_a_result_is_on_the_disk_before_the_work_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut could leave a manifest, truncated files and no checkpoints."""
    checkpoint = fail(tmp_path)
    artifact = tmp_path / WORK / ARTIFACT
    (artifact / "sub").mkdir()
    (artifact / "sub" / "weights").write_text("weights")
    (artifact / "outside").symlink_to("/proc/version")  # a disk that cannot be synced
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        assert checkpoint.exists()
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", record)
    files = stamp_files(artifact)
    names = "", "half", "sub", "sub/weights"
    assert set(synced) == {str(artifact / name) for name in names}
    complete_stage(tmp_path, replace(start_manifest(), files=files))
    assert synced[-1] == str(tmp_path)  # has the new names of the artifact and the manifest
    assert not checkpoint.exists()


@pytest.mark.parametrize("name", [BEGUN, OUTCOME])
def test_the_error_about_a_damaged_file_has_its_path(tmp_path: Path, name: str) -> None:
    fail(tmp_path)
    (tmp_path / WORK / name).write_text('{"finger')
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
    request = Request("b", "1e5", "c", {"data": ref}, {"stage": "a", "sizes": [1, 2], "to": None})
    request.write(tmp_path / "run" / "b")
    assert read_request(tmp_path / "run" / "b") == request
    file = tmp_path / "run" / "b" / REQUEST
    file.write_text(file.read_text().replace("format: 3", "format: 0"))
    with pytest.raises(RecipeError, match=rf"{file} .*format 0"):
        read_request(file.parent)


def test_stages_of_a_run_are_planned_or_started(tmp_path: Path) -> None:
    assert read_last_plan(tmp_path) is None
    for name in ("a", "b", "dropped", "started"):
        Request(name, "f", "c", {}, {}).write(tmp_path / name)
    complete(tmp_path / "b")
    complete(tmp_path / "started")
    # Stage "never" has no fingerprint and no directory; "dropped" is no longer planned. The result
    # of "b" is stale, because it has the fingerprint "f".
    plan = LastPlan("r", {"b": "1e5", "a": "f", "never": None})
    plan.write(tmp_path)
    assert read_last_plan(tmp_path) == plan
    statuses = {name: state.status for name, state in stage_states(tmp_path).items()}
    expected = {"b": Status.NOT_STARTED, "a": Status.NOT_STARTED, "started": Status.COMPLETE}
    assert list(statuses.items()) == list(expected.items())  # in this order
    assert "dropped" in stage_states(tmp_path, include=["dropped"])


def test_a_child_that_stops_at_the_deadline_stops_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_child(name: str, stage_dir: Path, *_: object) -> None:
        (stage_dir / WORK).mkdir()
        record_failure(stage_dir, "at step 1", stopped=stopped)
        raise RecipeError(f"{name} failed", "see the log")

    monkeypatch.setattr(stage_process, "run_to_end", fail_child)
    for stopped in (True, False):
        with pytest.raises(RecipeError) as caught:
            stage_process.run_child(
                PruneConfig(stage="prune"), tmp_path / str(stopped) / "prune", {}
            )
        assert isinstance(caught.value, StoppedByDeadlineError) == stopped
    monkeypatch.setenv(DEADLINE, "1")  # seconds since 1970, so the deadline has passed
    with pytest.raises(StoppedByDeadlineError):
        stage_process.run_child(PruneConfig(stage="prune"), tmp_path / "late" / "prune", {})
    assert not (tmp_path / "late").exists()


def test_a_child_with_one_device_is_not_a_rank_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search of several ranks may run in a Slurm job of several tasks."""
    program, child = tmp_path / "python", tmp_path / "prune"
    write_program(program, "env")
    monkeypatch.setattr(sys, "executable", str(program))
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "batch", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError):  # the program writes no result
        stage_process.run_child(PruneConfig(stage="prune"), child, {})
    [log] = (child / stage_process.LOGS).iterdir()
    assert {"SLURM_JOB_NAME=interactive", "RANK=0"} <= set(log.read_text().splitlines())
