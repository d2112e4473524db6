from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from launch.executors import local
from launch.plan import Plan
from launch.planned import PlannedStage
from launch.progress import Follower
from recipes.core import stage_process
from recipes.core.errors import RecipeError
from recipes.core.manifest import MANIFEST, WORK
from recipes.core.processes import cores
from recipes.core.run_state import record_failure
from recipes.core.stage import Resources

if TYPE_CHECKING:
    from collections.abc import Callable

AWKWARD = """it's "quoted" $HOME `id`
and two lines"""

TORCHRUN = """\
Global Checkpoint Load : Rank : 0 : Start time : 1795677141.638s : Time spent in load: 0.133s
============================================================
recipes.core.worker FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-01-31_{when}
  host      : somewhere
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 1235)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 1235
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-31_06:00:00
  host      : somewhere
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 1234)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""


@pytest.fixture
def stage(plan: Callable[..., Plan]) -> PlannedStage:
    """The distillation on two devices, its directory made."""
    stage = next(s for s in plan().stages if s.name == "distill")
    stage.directory.mkdir(parents=True)
    resources = Resources(devices=2, env={"FROM_STAGE": "s", "BOTH": "stage"})
    return replace(stage, config=replace(stage.config, resources=resources))


def test_command_starts_one_process_a_device(stage: PlannedStage, tmp_path: Path) -> None:
    command = local.command(stage, sys.executable)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--nproc-per-node=2" in command
    assert "--standalone" in command
    config = str(tmp_path / "run" / "distill" / "config.yaml")
    assert command[-4:] == ["-m", "recipes.core.worker", "recipes.stages.distill", config]


def test_one_process_is_started_without_torchrun(
    stage: PlannedStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # of the job that the launcher is in
    alone = replace(stage, config=replace(stage.config, resources=Resources()))
    config = str(tmp_path / "run" / "distill" / "config.yaml")
    expected = [sys.executable, "-m", "recipes.core.worker", "recipes.stages.distill", config]
    assert local.command(alone, sys.executable) == expected
    found = local.environment(alone, local.LocalConfig())
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("0", "0", "1")
    assert "WORLD_SIZE" not in local.environment(stage, local.LocalConfig())  # torchrun sets it


def environment(stage: PlannedStage, env: dict[str, str]) -> dict[str, str]:
    return local.environment(stage, local.LocalConfig(env=env))


def test_environment_shares_the_cores(
    stage: PlannedStage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    found = environment(stage, {"FROM_CLUSTER": "c", "BOTH": "cluster"})
    assert found["OMP_NUM_THREADS"] == str(max(1, cores() // 2))
    assert found["PYTHONPATH"] == f"{root}{os.pathsep}/mine"
    assert found["FROM_CLUSTER"] == "c"
    assert found["FROM_STAGE"] == "s"
    assert found["BOTH"] == "stage"


def test_only_cores_that_the_launcher_may_use_are_shared(stage: PlannedStage) -> None:
    allowed = os.sched_getaffinity(0)
    alone = replace(stage, config=replace(stage.config, resources=Resources()))
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert environment(alone, {})["OMP_NUM_THREADS"] == "1"
    finally:
        os.sched_setaffinity(0, allowed)


def test_environment_leaves_a_thread_to_each_of_many_devices(
    stage: PlannedStage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    many = replace(stage, config=replace(stage.config, resources=Resources(devices=4096)))
    found = environment(many, {})
    assert found == {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def test_cluster_may_set_the_threads(stage: PlannedStage) -> None:
    assert environment(stage, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def test_script_does_what_the_launcher_does(
    stage: PlannedStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real script, with an interpreter that only says how it was started."""
    python = fake_python(tmp_path, 'printf "%s\\n" "$@"; printf "%s" "$AWKWARD"')
    monkeypatch.setattr(sys, "executable", str(python))
    script = write_script(stage, AWKWARD=AWKWARD)
    assert os.access(script, os.X_OK)
    done = subprocess.run([script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "\n".join([*local.command(stage, sys.executable)[1:], AWKWARD])


def test_script_runs_where_the_launcher_ran(
    stage: PlannedStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(fake_python(tmp_path, "pwd -P")))
    here = tmp_path / "here it is"
    here.mkdir()
    monkeypatch.chdir(here)
    script = write_script(stage)
    done = subprocess.run([script], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(here.resolve())


def write_script(stage: PlannedStage, **env: str) -> Path:
    plan = Plan(stage.directory.parent, None, (replace(stage, action="run"),))  # type: ignore[arg-type]
    local.write_scripts(plan, local.LocalConfig(env=env))
    return stage.directory / local.SCRIPT


def fake_python(folder: Path, commands: str) -> Path:
    """A program to start in place of torchrun."""
    program = folder / "python"
    program.write_text(f"#!/usr/bin/env bash\n{commands}\n")
    program.chmod(0o755)
    return program


def start(stage: PlannedStage, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(program))
    write_script(stage, GREETING="hello")
    with Follower(stage, Console(file=StringIO())) as follower:
        local.run(stage, follower)


def says(stage: PlannedStage, error: str) -> str:
    """A shell command that leaves the message of a failing stage."""
    work, outcome = stage.directory / WORK, json.dumps({"stopped": False, "error": error})
    return f"mkdir '{work}'; printf '{outcome}' > '{work}/outcome.json'"


def failure(stage: PlannedStage, program: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    with pytest.raises(RecipeError) as caught:
        start(stage, program, monkeypatch)
    return str(caught.value)


def test_stage_that_writes_its_manifest_has_succeeded(
    stage: PlannedStage,
    complete: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    complete(Plan(stage.directory.parent, None, (stage,)))  # type: ignore[arg-type]
    (stage.directory / MANIFEST).rename(tmp_path / "written")
    program = fake_python(
        tmp_path,
        f'mv "{tmp_path}/written" "{stage.directory / MANIFEST}"\n'
        'echo "$GREETING $0"\necho bad >&2',
    )
    start(stage, program, monkeypatch)
    [log] = (stage.directory / "logs").iterdir()
    assert log.read_text().splitlines() == [f"hello {program}", "bad"]


@pytest.mark.parametrize("status", [0, 1, 7])
def test_stage_without_a_manifest_has_failed(
    stage: PlannedStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    program = fake_python(tmp_path, f"seq 1 9; echo boom >&2; exit {status}")
    message = failure(stage, program, monkeypatch)
    assert message.startswith("stage distill failed: it ended without a message")
    shown = [line.strip() for line in message.splitlines()]
    assert shown[1:6] == ["6", "7", "8", "9", "boom"]
    [log] = (stage.directory / "logs").iterdir()
    assert shown[6] == f"log: {log}"


@pytest.mark.parametrize(
    ("signal", "said"),
    [("KILL", "killed by SIGKILL: out of memory (the kernel's log"), ("TERM", "ended by SIGTERM")],
)
def test_stage_that_a_signal_ended_says_so(
    stage: PlannedStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: str, said: str
) -> None:
    message = failure(stage, fake_python(tmp_path, f"kill -{signal} $$"), monkeypatch)
    assert said in message


def test_a_stage_that_does_not_stop_is_killed(
    stage: PlannedStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training ends its step first, and that may take longer than anyone wants to wait."""
    monkeypatch.setattr(stage_process, "STOP_SECONDS", 0.1)
    program = fake_python(tmp_path, "trap '' TERM; echo $$; while :; do sleep 0.05; done")
    monkeypatch.setattr(sys, "executable", str(program))
    write_script(stage)
    log = tmp_path / "log"

    def interrupted() -> None:
        with log.open("wb") as output, local.start_script(stage, output):
            while not log.read_text().endswith("\n"):
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not Path("/proc", log.read_text().strip()).exists()


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ("06:00:01", "rank 1 was killed by SIGKILL: out of memory"),
        ("06:00:31", "lost its connection"),  # by torchrun, since it did not end by itself
    ],
)
def test_a_rank_that_was_killed_is_named(
    stage: PlannedStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, said: str
) -> None:
    """As torchrun reports it, whatever the others say of it."""
    report = TORCHRUN.format(when=when)
    program = f"{says(stage, 'lost its connection')}\ncat <<'END'\n{report}END\nexit 1"
    message = failure(stage, fake_python(tmp_path, program), monkeypatch)
    assert message.startswith(f"stage distill failed: {said}")


def test_every_start_has_its_own_log(
    stage: PlannedStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at one time by the clock, which may have been set back."""
    monkeypatch.setattr(stage_process.time, "strftime", lambda form: "now")
    for number in range(3):
        failure(stage, fake_python(tmp_path, f"echo {number}; exit 1"), monkeypatch)
    logs = {log.name: log.read_text() for log in (stage.directory / "logs").iterdir()}
    assert logs == {"now.log": "0\n", "now-2.log": "1\n", "now-3.log": "2\n"}


@pytest.mark.parametrize("forced", [False, True])
def test_stage_that_leaves_an_old_manifest_has_failed(
    stage: PlannedStage,
    complete: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forced: bool,
) -> None:
    """Of other settings, or, when it was forced to run again, of the same."""
    old = stage if forced else replace(stage, fingerprint="old")
    complete(Plan(stage.directory.parent, None, (old,)))  # type: ignore[arg-type]
    assert "distill failed" in failure(stage, fake_python(tmp_path, "exit 0"), monkeypatch)


def test_failed_stage_is_explained_by_its_own_message(
    stage: PlannedStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = fake_python(tmp_path, f"{says(stage, 'no memory')}; exit 1")
    message = failure(stage, program, monkeypatch)
    assert message.startswith("stage distill failed: no memory\n  log: ")


def test_message_of_an_earlier_run_is_not_shown(
    stage: PlannedStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_failure(stage.directory, "an old problem")
    message = failure(stage, fake_python(tmp_path, "echo boom; exit 1"), monkeypatch)
    assert "an old problem" not in message
    assert "boom" in message
