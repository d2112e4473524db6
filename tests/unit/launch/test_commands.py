"""``status``, ``logs``, ``runs``, ``cancel`` and signals, for runs on this machine."""

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
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from launch import commands, lock
from launch.run_status import progress_text, read_statuses
from recipes.core.errors import RecipeError
from recipes.core.manifest import MANIFEST
from recipes.core.run_state import RUN_FILE, begin_work, record_failure, stage_state
from recipes.core.snapshot import CODE
from tests.support.launcher import LAUNCHER
from tests.support.manifests import edit_manifest, unfinished_manifest
from tests.unit.conftest import (
    RECIPE,
    SMALL_STUDENT,
    Complete,
    Launch,
    MakePlan,
    stage_named,
    write_last_plan,
)

AFTER_DISTILL = ["evaluate", "export_hf", "report"]
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
"""A module that is imported for up to ten minutes, and swallows ``KeyboardInterrupt``."""

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
"""A launcher that waits for a stage. The stage takes 2 seconds to end after SIGTERM."""

RunCommand = Callable[..., str]
"""Type of the fixture ``run_command``."""


@pytest.fixture
def run_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunCommand:
    """Runs a command in this process, in an empty folder; returns the command's output."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*arguments: str) -> str:
        output = StringIO()
        assert commands.run(arguments, Console(file=output, width=200, soft_wrap=True)) == 0
        return output.getvalue()

    return run


@pytest.fixture
def run_dir(plan: MakePlan, complete: Complete, tmp_path: Path) -> Path:
    """A run that was interrupted in its distillation: after 3 of 60 steps of 2 seconds."""
    planned = plan()
    unfinished = ("distill", *AFTER_DISTILL)
    complete(planned, *(stage.name for stage in planned.stages if stage.name not in unfinished))
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
    """Returns the status of each stage by name, in the order of the plan."""
    return {stage.name: stage.status for stage in read_statuses(run_dir)}


def test_status_of_an_interrupted_run(run_dir: Path, launch: Launch) -> None:
    statuses = states(run_dir)
    assert list(statuses)[-4:] == ["distill", *AFTER_DISTILL]
    assert list(statuses.values())[-4:] == ["interrupted"] + ["not started"] * 3
    assert set(list(statuses.values())[:-4]) == {"complete"}
    shown = launch("status", f"run_dir={run_dir}")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"distill +interrupted +distill 3/60, 0:01:54 left *$", shown.stdout, re.M)
    # 57 steps of 2 seconds remain. The later stages add 2 to 3 seconds: their times are estimated
    # from those of the complete stages, which were fast.
    assert re.search(r"^about 0:01:5[67] left of the run$", shown.stdout, re.M)
    assert "86.5 M parameters" in shown.stdout
    edit_manifest(run_dir / "prune", fingerprint="other")
    assert states(run_dir)["prune"] == "not started", "the result is of another plan"


def test_status_shows_why_a_stage_failed_and_logs_shows_its_log(
    run_dir: Path, run_command: RunCommand
) -> None:
    record_failure(run_dir / "distill", "no memory\n  fix: buy some")
    assert states(run_dir)["distill"] == "failed"
    assert "no memory" in run_command("status", f"run_dir={run_dir}")
    shown = run_command("logs", f"run_dir={run_dir}", "lines=2")
    assert shown.splitlines()[1:] == ["line 198", "line 199"]
    # The first line is the path of the log. By default, 50 lines of the log follow.
    assert len(run_command("logs", f"run_dir={run_dir}", "stage=distill").splitlines()) == 51
    record_failure(run_dir / "distill", "at step 3", stopped=True)
    assert states(run_dir)["distill"] == "stopped"


def test_the_stage_in_the_lock_file_is_running(run_dir: Path) -> None:
    with lock.acquire(run_dir) as set_stage:
        set_stage("distill")
        assert list(states(run_dir).values())[-4:] == ["running"] + ["pending"] * 3
    assert lock.read_holder(run_dir) is None


def test_reading_the_holder_does_not_keep_a_launcher_from_starting(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher waits until a reader releases its shared lock, which ``read_holder`` takes."""
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
    """An example is Lustre that is mounted without the option ``flock``."""

    def failing_flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", failing_flock)
    with pytest.raises(RecipeError, match="localflock"), lock.acquire(tmp_path):
        pass
    with pytest.raises(RecipeError, match="localflock"):
        lock.read_holder(tmp_path)


def test_runs_are_listed_with_their_state_and_results(
    run_dir: Path, plan: MakePlan, complete: Complete, run_command: RunCommand
) -> None:
    def listed_run() -> str:
        """Returns the row of the only run, after the table's title and headings."""
        return run_command("runs", str(run_dir.parent)).splitlines()[2]

    unfinished = listed_run()
    assert "llama_width_prune" in unfinished
    assert "interrupted at distill" in unfinished
    assert "perplexity" not in unfinished
    complete(plan())
    finished = listed_run()
    assert " complete " in finished
    assert "perplexity 20.5 → 938.0 → 45.3, recovered 79%" in finished
    assert "86.5 M" in finished
    assert finished.rstrip().endswith("now")  # the column "age"
    (run_dir / "prune" / MANIFEST).write_text("{")
    assert "unreadable: see status" in listed_run()
    with pytest.raises(RecipeError, match="is not a readable manifest"):
        run_command("status", f"run_dir={run_dir}")


def test_clean_deletes_only_what_no_other_run_needs(run_dir: Path, run_command: RunCommand) -> None:
    """The other run is in a folder of a sweep. An earlier version wrote it, in another format."""
    (run_dir / CODE / "hash").mkdir(parents=True)  # a snapshot of the code
    other = run_dir.parent / "sweep" / "0"
    shutil.copytree(run_dir, other)
    link = run_dir.parent / "link"
    link.symlink_to(run_dir)
    # Changes the paths in ``other`` so that it needs only two results of ``run_dir``: that of
    # import_hf as an input, by the path of a link, and the exported model as ``hf_path``.
    for request in other.glob("*/config.yaml"):
        text = request.read_text().replace("format: 3", "format: 1")
        text = text.replace(f"{run_dir}/", f"{other}/")
        text = re.sub("hf_path: .*", f"hf_path: {run_dir}/export_hf/artifact", text)
        request.write_text(text.replace(f"{other}/import_hf", f"{link}/import_hf"))
    files = sorted(run_dir.rglob("[!.]*"))  # all but the lock file
    listed = run_command("runs", "clean", str(run_dir))
    assert "nothing was deleted" in listed
    assert re.search(rf"{run_dir}/import_hf .* needed by {other}", listed)
    assert sorted(run_dir.rglob("[!.]*")) == files
    with lock.acquire(run_dir), pytest.raises(RecipeError, match="is being run"):
        run_command("runs", "clean", str(run_dir), "--yes")
    assert sorted(run_dir.rglob("[!.]*")) == files
    other_files = sorted(other.rglob("*"))
    run_command("runs", "clean", str(run_dir), "--yes")
    folders = {folder.name for folder in run_dir.iterdir() if folder.is_dir()}
    assert folders == {"import_hf", "export_hf", CODE}, "the remaining stages need the code"
    assert (run_dir / "import_hf" / MANIFEST).exists()
    assert sorted(other.rglob("*")) == other_files
    # If both runs are cleaned, nothing is needed any more.
    run_command("runs", "clean", str(run_dir), str(other), "--yes")
    assert not run_dir.exists()
    assert not other.exists()


def test_clean_deletes_a_sweep_but_no_other_folder_of_runs(
    run_dir: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    sweep = tmp_path / "cwd" / "runs" / "sweeps" / "1"
    shutil.copytree(run_dir, sweep / "0")
    for name in ("", ".", "..", "sweeps", "runs", str(sweep)):
        message = re.escape(f"'{name}' is neither a run nor a sweep")
        with pytest.raises(RecipeError, match=message):
            run_command("runs", "clean", name, "--yes")
    assert (sweep / "0" / RUN_FILE).exists()
    (sweep / "multirun.yaml").touch()  # Hydra writes it at the start of a sweep
    run_command("runs", "clean", "sweeps/1", "--yes")
    assert not (sweep / "0").exists()
    assert (run_dir / RUN_FILE).exists()


def test_invalid_commands_are_refused(run_dir: Path, run_command: RunCommand) -> None:
    for arguments, message in (
        (["runs", "nowhere"], "there is no run in"),
        (["runs", "--all"], "runs does not know '--all'"),
        (["runs", "clean"], "names of runs"),
        (["runs", "clean", "nowhere", "--yes"], "is not a directory"),
        (["status"], "no run is given"),
        (["status", "run_dri=x"], "Did you mean 'run_dir'?"),
        (["status", "run_dir=nowhere"], "is not a directory"),
        (["logs", "run_dir=."], "is not a run"),
        (["cancel", "stage=distill", "run_dir=x"], "cancel does not know 'stage=distill'"),
        (["logs", f"run_dir={run_dir}", "stage=distil"], "Did you mean 'distill'?"),
        (["logs", f"run_dir={run_dir}", "stage=report"], "it has no log"),
        (["logs", f"run_dir={run_dir}", "lines=x"], "not a number"),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)):
            run_command(*arguments)


def test_cancel_stops_a_launcher_like_ctrl_c(
    tmp_path: Path, hf_folder: Path, run_dir: Path, run_command: RunCommand
) -> None:
    assert "nothing runs" in run_command("cancel", f"run_dir={run_dir}")
    cancelled_dir = tmp_path / "cancelled"
    command = [sys.executable, LAUNCHER, RECIPE, f"run_dir={cancelled_dir}"]
    # This stage takes seconds, because it imports torch.
    command += [f"model.hf_path={hf_folder}", *SMALL_STUDENT, "only=[import_hf]"]
    launcher = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    # Wait until the launcher runs a stage.
    while (holder := lock.read_holder(cancelled_dir)) is None or holder.stage is None:
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.05)
    cancelled = run_command("cancel", f"run_dir={cancelled_dir}")
    assert f"{cancelled_dir}: stopped at import_hf\n" in cancelled
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 130  # as after Ctrl+C: 128 + SIGINT
    assert "interrupted; the same command resumes" in output
    assert lock.read_holder(cancelled_dir) is None


def test_cancel_of_another_users_run_is_refused(
    run_dir: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process holds the lock. ``os.kill`` fails as if the process were another user's."""

    def failing_kill(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", failing_kill)
    refusal = pytest.raises(RecipeError, match=f"process {os.getpid()} .* another user")
    with lock.acquire(run_dir), refusal:
        run_command("cancel", f"run_dir={run_dir}")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_imports(tmp_path: Path, sent: signal.Signals) -> None:
    """A fake module ``hydra`` takes long to import, and swallows ``KeyboardInterrupt``."""
    (tmp_path / "hydra.py").write_text(SLOW_IMPORT)
    launcher = subprocess.Popen(
        [sys.executable, LAUNCHER],
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
    lines = {launcher.stdout.readline() for _ in range(2)}  # in any order
    assert lines == {"started\n", "waits\n"}
    for _ in range(2):
        launcher.send_signal(signal.SIGTERM)
        time.sleep(1)  # the stage needs 2 seconds, so the second signal comes while it ends
    assert launcher.communicate(timeout=60)[0] == "ended\n"


def test_remaining_time_counts_from_the_last_restart(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    # Seconds and steps. The restart at 1000 s repeats step 3. Since then, a step takes 10 s.
    times = [(0, 1), (1, 2), (2, 3), (1000, 3), (1010, 4), (1020, 5)]
    records = [
        {"time": seconds, "task": "distill", "done": step, "total": 10} for seconds, step in times
    ]
    assert progress_text(stage_state(tmp_path)) == ""
    metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert progress_text(stage_state(tmp_path)) == "distill 5/10, 0:00:50 left"
    metrics.write_text(json.dumps(records[0]) + "\n")  # one record shows no speed
    assert progress_text(stage_state(tmp_path)) == "distill 1/10"
