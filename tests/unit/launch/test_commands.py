"""Commands about runs on this machine; ``tests/slurm`` tests the commands about Slurm jobs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from launch import commands, lock
from launch.run_status import progress_text, read_statuses
from recipes.core.errors import RecipeError
from recipes.core.manifest import MANIFEST
from recipes.core.run_state import begin_work, record_failure, stage_state
from recipes.core.snapshot import CODE
from tests.support.manifests import edit_manifest, unfinished_manifest
from tests.unit.conftest import SMALL_STUDENT, stage_named, write_last_plan

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import Complete, Launch, MakePlan

AFTER = ["evaluate", "export_hf", "report"]
"""Stages that follow the distillation."""
SLOW_IMPORT = """\
import time
try:
    print("importing", flush=True)
    for _ in range(6000):  # a signal just before a sleep is handled only after the sleep
        time.sleep(0.1)
except BaseException:
    pass
"""

SLOW_STAGE = """\
import signal, sys, time
from launch.run import on_interrupt
from recipes.core.stage_process import start_process

on_interrupt(signal.default_int_handler)
stage = "trap 'sleep 2; echo ended; exit' TERM; echo started; while :; do sleep 0.1; done"
with start_process(["sh", "-c", stage], sys.stdout.buffer):
    sys.stdout.write("waits\\n")  # one write, even if not buffered
    sys.stdout.flush()
    while True:  # a signal just before a sleep is handled only after the sleep
        time.sleep(0.1)
"""


@pytest.fixture
def run_dir(plan: MakePlan, complete: Complete, tmp_path: Path) -> Path:
    """A run that was interrupted in its distillation."""
    planned = plan()
    complete(
        planned, *(stage.name for stage in planned.stages if stage.name not in ("distill", *AFTER))
    )
    write_last_plan(planned)
    distill = stage_named(planned, "distill")
    begin_work(distill.directory, unfinished_manifest(distill.request()))
    log = distill.directory / "logs" / "1.log"
    log.parent.mkdir()
    log.write_text("".join(f"line {n}\n" for n in range(200)))
    steps = [{"time": 100 + 2 * n, "task": "distill", "done": n, "total": 60} for n in (1, 2, 3)]
    (distill.directory / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    return tmp_path / "run"


def states(run_dir: Path) -> dict[str, str]:
    return {stage.name: stage.status for stage in read_statuses(run_dir)}


def test_status_of_an_interrupted_run(run_dir: Path, launch: Launch) -> None:
    statuses = states(run_dir)
    assert list(statuses)[-4:] == ["distill", *AFTER]
    assert list(statuses.values())[-4:] == ["interrupted"] + ["not started"] * 3
    assert set(list(statuses.values())[:-4]) == {"complete"}
    shown = launch("status", f"run_dir={run_dir}")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"distill +interrupted +distill 3/60, 0:01:54 left *$", shown.stdout, re.M)
    # 57 steps of 2 seconds remain. Later stages add little: the complete ones were fast.
    assert re.search(r"^about 0:01:5[67] left of the run$", shown.stdout, re.M)
    assert "86.5 M parameters" in shown.stdout


def test_failed_stage_says_why_and_its_log_is_shown(run_dir: Path, launch: Launch) -> None:
    record_failure(run_dir / "distill", "no memory\n  fix: buy some")
    assert states(run_dir)["distill"] == "failed"
    assert "no memory" in launch("status", f"run_dir={run_dir}").stdout
    shown = launch("logs", f"run_dir={run_dir}", "lines=2")
    assert shown.stdout.splitlines()[1:] == ["line 198", "line 199"]
    # The log's path, and 50 lines by default.
    assert len(launch("logs", f"run_dir={run_dir}", "stage=distill").stdout.splitlines()) == 51
    record_failure(run_dir / "distill", "at step 3", stopped=True)
    assert states(run_dir)["distill"] == "stopped"


def test_result_with_another_fingerprint_is_not_complete(run_dir: Path) -> None:
    edit_manifest(run_dir / "prune", fingerprint="other")
    assert states(run_dir)["prune"] == "not started"


def test_the_stage_in_the_lock_file_is_running(run_dir: Path) -> None:
    with lock.acquire(run_dir) as set_stage:
        set_stage("distill")
        assert list(states(run_dir).values())[-4:] == ["running"] + ["pending"] * 3
        with pytest.raises(RecipeError, match="another process is running"), lock.acquire(run_dir):
            pass
    assert lock.read_holder(run_dir) is None


def test_reading_the_holder_does_not_keep_a_launcher_from_starting(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 60)
    with (run_dir / lock.LOCK).open("a") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: fcntl.flock(reader, fcntl.LOCK_UN)).start()
        with lock.acquire(run_dir):
            assert lock.read_holder(run_dir) is not None


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Lustre without the mount option ``flock`` does not implement ``flock``."""

    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RecipeError, match="localflock"), lock.acquire(tmp_path):
        pass
    with pytest.raises(RecipeError, match="localflock"):
        lock.read_holder(tmp_path)


def listed_run(launch: Launch, run_dir: Path) -> str:
    shown = launch("runs", str(run_dir.parent))
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.splitlines()[2]  # after the table's title and headings


def test_runs_are_listed_with_their_state_and_results(
    run_dir: Path, plan: MakePlan, complete: Complete, launch: Launch
) -> None:
    unfinished = listed_run(launch, run_dir)
    assert "llama_width_prune" in unfinished
    assert "interrupted at distill" in unfinished
    assert "perplexity" not in unfinished
    complete(plan())
    finished = listed_run(launch, run_dir)
    assert " complete " in finished
    assert "perplexity 20.5 → 938.0 → 45.3, recovered 79%" in finished
    assert "86.5 M" in finished
    assert finished.rstrip().endswith("now")
    (run_dir / "prune" / MANIFEST).write_text("{")
    assert "unreadable: see status" in listed_run(launch, run_dir)
    assert "is not a readable manifest" in launch("status", f"run_dir={run_dir}").stderr


def test_clean_deletes_only_what_no_other_run_needs(run_dir: Path, launch: Launch) -> None:
    """The command deletes nothing without ``--yes``, or while a launcher holds the run's lock.

    The other run was written by an earlier version, and is in a folder of a sweep.
    """
    (run_dir / CODE / "hash").mkdir(parents=True)
    other = run_dir.parent / "sweep" / "0"
    shutil.copytree(run_dir, other)
    # Of the run to clean, ``other`` needs only the result of import_hf, and the exported model.
    for request in other.glob("*/config.yaml"):
        text = (
            request.read_text()
            .replace(f"{run_dir}/", f"{other}/")
            .replace("format: 3", "format: 1")
        )
        text = re.sub("hf_path: .*", f"hf_path: {run_dir}/export_hf/artifact", text)
        request.write_text(text.replace(f"{other}/import_hf", f"{run_dir}/import_hf"))
    before = sorted(run_dir.rglob("[!.]*"))  # all but the lock file
    listed = launch("runs", "clean", str(run_dir))
    assert "nothing was deleted" in listed.stdout
    assert re.search(rf"{run_dir}/import_hf .* needed by {other}", listed.stdout)
    assert sorted(run_dir.rglob("[!.]*")) == before
    with lock.acquire(run_dir):
        assert "is being run" in launch("runs", "clean", str(run_dir), "--yes").stderr
    assert sorted(run_dir.rglob("[!.]*")) == before
    other_files = sorted(other.rglob("*"))
    assert launch("runs", "clean", str(run_dir), "--yes").returncode == 0
    folders = {folder.name for folder in run_dir.iterdir() if folder.is_dir()}
    assert folders == {"import_hf", "export_hf", CODE}, "the remaining stage needs the code"
    assert (run_dir / "import_hf" / MANIFEST).exists()
    assert sorted(other.rglob("*")) == other_files
    assert launch("runs", "clean", str(run_dir), str(other), "--yes").returncode == 0
    assert not run_dir.exists()
    assert not other.exists()


def test_clean_keeps_what_a_run_needs_behind_a_link(run_dir: Path, launch: Launch) -> None:
    other = run_dir.parent / "other"
    shutil.copytree(run_dir, other)
    (link := run_dir.parent / "link").symlink_to(run_dir)
    request = other / "score" / "config.yaml"
    request.write_text(request.read_text().replace(f"{run_dir}/import_hf", f"{link}/import_hf"))
    for folder in other.iterdir():
        if folder.is_dir() and folder != request.parent:
            shutil.rmtree(folder)
    listed = launch("runs", "clean", str(run_dir)).stdout
    assert re.search(rf"{run_dir}/import_hf .* needed by {other}", listed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "nowhere"], "there is no run in"),
        (["runs", "--all"], "runs does not know '--all'"),
        (["runs", "clean"], "names of runs"),
        (["runs", "clean", "nowhere", "--yes"], "is not a directory"),
        (["status"], "no run is given"),
        (["status", "run_dri=x"], "Did you mean 'run_dir'?"),
        (["status", "run_dir=nowhere"], "is not a directory"),
        (["logs", "run_dir=."], "is not a run"),
        (["cancel", "stage=distill", "run_dir=x"], "cancel does not know 'stage=distill'"),
        (["logs", "run_dir=RUN", "stage=distil"], "Did you mean 'distill'?"),
        (["logs", "run_dir=RUN", "stage=report"], "it has no log"),
        (["logs", "run_dir=RUN", "lines=x"], "not a number"),
    ],
)
def test_invalid_commands_are_refused(
    run_dir: Path, launch: Launch, arguments: list[str], message: str
) -> None:
    refused = launch(*(argument.replace("RUN", str(run_dir)) for argument in arguments))
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert message in refused.stderr


def test_cancel_stops_a_launcher_like_ctrl_c(
    root: Path, tmp_path: Path, hf_folder: Path, run_dir: Path, launch: Launch
) -> None:
    assert "nothing runs" in launch("cancel", f"run_dir={run_dir}").stdout
    run_dir = tmp_path / "cancelled"
    command = [sys.executable, str(root / "launch" / "run.py"), "recipe=llama_width_prune"]
    command += [f"run_dir={run_dir}", f"model.hf_path={hf_folder}"]
    command += SMALL_STUDENT
    launcher = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while (holder := lock.read_holder(run_dir)) is None or holder.stage is None:
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.05)
    cancelled = launch("cancel", f"run_dir={run_dir}")
    assert f"{run_dir}: stopped at " in cancelled.stdout, cancelled.stderr
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 130
    assert "interrupted; the same command resumes" in output
    assert lock.read_holder(run_dir) is None


def test_cancel_of_another_users_run_is_refused(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    refusal = pytest.raises(RecipeError, match=f"process {os.getpid()} .* another user")
    with lock.acquire(run_dir), refusal:
        commands.cancel({"run_dir": str(run_dir)}, Console())


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_imports(root: Path, tmp_path: Path, sent: signal.Signals) -> None:
    """A fake hydra imports slowly, and swallows exceptions such as ``KeyboardInterrupt``."""
    (tmp_path / "hydra.py").write_text(SLOW_IMPORT)
    launcher = subprocess.Popen(
        [sys.executable, str(root / "launch" / "run.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell may have started this test in the background, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),
    )
    assert launcher.stdout
    assert launcher.stdout.readline() == "importing\n"
    launcher.send_signal(sent)
    output, _ = launcher.communicate(timeout=120)
    assert (launcher.returncode, output) == (130, "interrupted\n")


def test_a_repeated_sigterm_does_not_end_the_wait_for_a_stage(root: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", SLOW_STAGE], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout
    lines = {launcher.stdout.readline() for _ in range(2)}
    assert lines == {"started\n", "waits\n"}
    for _ in range(2):
        launcher.send_signal(signal.SIGTERM)
        time.sleep(1)
    assert launcher.communicate(timeout=60)[0] == "ended\n"


def test_remaining_time_counts_from_the_last_restart(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    times = [(0, 1), (1, 2), (2, 3), (1000, 3), (1010, 4), (1020, 5)]  # time, step
    records = [{"time": t, "task": "distill", "done": d, "total": 10} for t, d in times]
    assert progress_text(stage_state(tmp_path)) == ""
    metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert progress_text(stage_state(tmp_path)) == "distill 5/10, 0:00:50 left"
    metrics.write_text(json.dumps(records[0]) + "\n")
    assert progress_text(stage_state(tmp_path)) == "distill 1/10"
