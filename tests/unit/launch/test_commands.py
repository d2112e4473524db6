"""``status``, ``cancel`` and ``logs`` of runs on this machine; those on Slurm have tests there."""

from __future__ import annotations

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
from typing import TYPE_CHECKING

import pytest

from launch import lock
from launch.run_status import progress_text, read_statuses
from recipes.core.errors import RecipeError
from recipes.core.manifest import MANIFEST
from recipes.core.run_state import (
    begin_work,
    record_failure,
    stage_state,
)
from tests.support.manifests import begun
from tests.unit.conftest import record

if TYPE_CHECKING:
    from pathlib import Path

    from launch.plan import Plan

Launch = Callable[..., subprocess.CompletedProcess[str]]
MakePlan = Callable[..., "Plan"]
Complete = Callable[..., None]
AFTER = ["evaluate", "export_hf", "report"]
"""Stages that follow the distillation."""
SLOW_IMPORT = """\
import time
try:
    print("importing", flush=True)
    time.sleep(600)
except BaseException:
    pass
"""


@pytest.fixture
def run_dir(plan: MakePlan, complete: Complete, tmp_path: Path) -> Path:
    """A run that was interrupted in its distillation."""
    made = plan()
    complete(made, *(stage.name for stage in made.stages if stage.name not in ("distill", *AFTER)))
    record(made)
    distill = next(stage for stage in made.stages if stage.name == "distill")
    begin_work(distill.directory, begun(distill.request()))
    log = distill.directory / "logs" / "1.log"
    log.parent.mkdir()
    log.write_text("".join(f"line {n}\n" for n in range(200)))
    steps = [{"time": 100 + 2 * n, "task": "distill", "done": n, "total": 60} for n in (1, 2, 3)]
    (distill.directory / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    return tmp_path / "run"


def states(run_dir: Path) -> dict[str, str]:
    return {stage.name: stage.status for stage in read_statuses(run_dir)}


def test_interrupted_run(run_dir: Path, launch: Launch) -> None:
    found = states(run_dir)
    assert list(found)[-4:] == ["distill", *AFTER]
    assert list(found.values())[-4:] == ["interrupted"] + ["not started"] * 3
    assert set(list(found.values())[:-4]) == {"complete"}
    shown = launch("status", f"run_dir={run_dir}")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"distill +interrupted +distill 3/60, 0:01:54 left *$", shown.stdout, re.M)
    assert re.search(r"^about 0:01:5[67] left of the run$", shown.stdout, re.M)
    assert "86.5 M parameters" in shown.stdout


def test_failed_stage_says_why(run_dir: Path, launch: Launch) -> None:
    record_failure(run_dir / "distill", "no memory\n  fix: buy some")
    assert states(run_dir)["distill"] == "failed"
    assert "no memory" in launch("status", f"run_dir={run_dir}").stdout
    record_failure(run_dir / "distill", "at step 3", stopped=True)
    assert states(run_dir)["distill"] == "stopped"


def test_outdated_result_is_not_complete(run_dir: Path) -> None:
    manifest = run_dir / "prune" / MANIFEST
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "fingerprint": "other"}))
    assert states(run_dir)["prune"] == "not started"


def test_running_stage_is_the_one_its_launcher_names(run_dir: Path) -> None:
    with lock.acquire(run_dir) as set_stage:
        set_stage("distill")
        assert list(states(run_dir).values())[-4:] == ["running"] + ["pending"] * 3
        with pytest.raises(RecipeError, match="another process is running"), lock.acquire(run_dir):
            pass
    assert lock.read_holder(run_dir) is None


def test_a_look_at_the_lock_keeps_nobody_from_starting(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 60)
    with (run_dir / lock.LOCK).open("a") as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: fcntl.flock(looks, fcntl.LOCK_UN)).start()
        with lock.acquire(run_dir):
            assert lock.read_holder(run_dir) is not None


def test_logs_are_those_of_the_stage_that_failed(run_dir: Path, launch: Launch) -> None:
    record_failure(run_dir / "distill", "no memory")
    shown = launch("logs", f"run_dir={run_dir}", "lines=2")
    assert shown.stdout.splitlines()[1:] == ["line 198", "line 199"]
    assert len(launch("logs", f"run_dir={run_dir}", "stage=distill").stdout.splitlines()) == 51


def row(launch: Launch, run_dir: Path) -> str:
    shown = launch("runs", str(run_dir.parent))
    assert shown.returncode == 0, shown.stderr
    _, _, found = shown.stdout.splitlines()
    return found


def test_runs_are_listed_with_where_they_are_and_what_they_measured(
    run_dir: Path, plan: MakePlan, complete: Complete, launch: Launch
) -> None:
    unfinished = row(launch, run_dir)
    assert "llama_width_prune" in unfinished
    assert "interrupted at distill" in unfinished
    assert "perplexity" not in unfinished
    complete(plan())
    finished = row(launch, run_dir)
    assert " complete " in finished
    assert "perplexity 20.5 → 938.0 → 45.3, recovered 79%" in finished
    assert "86.5 M" in finished
    assert finished.rstrip().endswith("now")
    (run_dir / "prune" / MANIFEST).write_text("{")
    assert "unreadable: see status" in row(launch, run_dir)
    assert "is not a readable manifest" in launch("status", f"run_dir={run_dir}").stderr


def test_clean_deletes_runs_but_what_others_need(run_dir: Path, launch: Launch) -> None:
    """Nothing before it is confirmed, and nothing that runs."""
    other = run_dir.with_name("other")
    shutil.copytree(run_dir, other)
    for request in other.glob("*/config.yaml"):
        text = request.read_text().replace(f"{run_dir}/", f"{other}/")
        request.write_text(text.replace(f"{other}/import_hf", f"{run_dir}/import_hf"))
    before = sorted(run_dir.rglob("[!.]*"))
    asked = launch("runs", "clean", str(run_dir))
    assert "nothing was deleted" in asked.stdout
    assert re.search(rf"{run_dir}/import_hf .* kept for {other}", asked.stdout)
    assert sorted(run_dir.rglob("[!.]*")) == before
    with lock.acquire(run_dir):
        assert "is being run" in launch("runs", "clean", str(run_dir), "--yes").stderr
    assert sorted(run_dir.rglob("[!.]*")) == before
    rest = sorted(other.rglob("*"))
    assert launch("runs", "clean", str(run_dir), "--yes").returncode == 0
    assert [folder.name for folder in run_dir.iterdir() if folder.is_dir()] == ["import_hf"]
    assert (run_dir / "import_hf" / MANIFEST).exists()
    assert sorted(other.rglob("*")) == rest
    assert launch("runs", "clean", str(run_dir), str(other), "--yes").returncode == 0
    assert not run_dir.exists()
    assert not other.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs", "nowhere"], "there is no run in"),
        (["runs", "--all"], "runs does not know '--all'"),
        (["runs", "clean"], "which runs?"),
        (["runs", "clean", "nowhere", "--yes"], "is not a directory"),
        (["status"], "which run?"),
        (["status", "run_dri=x"], "Did you mean 'run_dir'?"),
        (["status", "run_dir=nowhere"], "is not a directory"),
        (["logs", "run_dir=."], "is not a run"),
        (["cancel", "stage=distill", "run_dir=x"], "cancel does not know 'stage=distill'"),
    ],
)
def test_commands_that_cannot_be_done(launch: Launch, words: list[str], message: str) -> None:
    refused = launch(*words)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert message in refused.stderr


def test_logs_of_no_such_stage(run_dir: Path, launch: Launch) -> None:
    assert "Did you mean 'distill'?" in launch("logs", f"run_dir={run_dir}", "stage=distil").stderr
    assert "it has no log" in launch("logs", f"run_dir={run_dir}", "stage=report").stderr
    assert "not a number" in launch("logs", f"run_dir={run_dir}", "lines=x").stderr


def test_cancel_stops_the_launcher_and_what_it_started(
    run_dir: Path, launch: Launch, root: Path, hf_folder: Path
) -> None:
    """A real launcher, whose stage is a script that would not end."""
    assert "nothing runs" in launch("cancel", f"run_dir={run_dir}").stdout
    program = (
        "import sys, time, subprocess\n"
        "from pathlib import Path\n"
        "from launch import run, lock\n"
        "run.signal.signal(run.signal.SIGTERM, run.signal.default_int_handler)\n"
        f"with lock.acquire(Path({str(run_dir)!r})) as set_stage:\n"
        "    set_stage('distill')\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(600)\n"
        "    except KeyboardInterrupt:\n"
        "        sys.exit(130)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE)
    assert launcher.stdout
    assert launcher.stdout.readline() == b"ready\n"
    done = launch("cancel", f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert f"{run_dir}: stopped at distill" in done.stdout
    assert launcher.wait(timeout=120) == 130


def test_cancelled_launcher_ends_as_with_ctrl_c(
    root: Path, tmp_path: Path, hf_folder: Path, launch: Launch
) -> None:
    command = [sys.executable, str(root / "launch" / "run.py"), "recipe=llama_width_prune"]
    command += [f"run_dir={tmp_path}/run", f"model.hf_path={hf_folder}"]
    command += ["stages.prune.target_hidden_size=64", "stages.prune.target_ffn_hidden_size=128"]
    launcher = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while (held := lock.read_holder(tmp_path / "run")) is None or held.stage is None:
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.05)
    cancelled = launch("cancel", f"run_dir={tmp_path}/run")
    assert "run: stopped at " in cancelled.stdout, cancelled.stderr
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 130
    assert "interrupted; the same command resumes" in output
    assert lock.read_holder(tmp_path / "run") is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_imports(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Stopped in the import of Hydra, which is slow and hides what is raised in it."""
    (tmp_path / "hydra.py").write_text(SLOW_IMPORT)
    launcher = subprocess.Popen(
        [sys.executable, str(root / "launch" / "run.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # of a shell's background
    )
    assert launcher.stdout
    assert launcher.stdout.readline() == "importing\n"
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=120)
    assert (launcher.returncode, output) == (130, "interrupted\n")


def test_remaining_time_counts_from_the_last_restart(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    times = [(0, 1), (1, 2), (2, 3), (1000, 3), (1010, 4), (1020, 5)]
    records = [{"time": t, "task": "distill", "done": d, "total": 10} for t, d in times]
    assert progress_text(stage_state(tmp_path)) == ""
    metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert progress_text(stage_state(tmp_path)) == "distill 5/10, 0:00:50 left"
    metrics.write_text(json.dumps(records[0]) + "\n")
    assert progress_text(stage_state(tmp_path)) == "distill 1/10"
