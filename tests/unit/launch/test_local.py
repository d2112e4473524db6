"""Stages as local processes: how they are started, and how failures are explained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

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
from recipes.core.stage import NEEDS_GPU, Resources
from tests.support.launcher import write_program
from tests.unit.conftest import Complete, MakePlan, stage_named

AWKWARD = """it's "quoted" $HOME `id`
and two lines"""
"""Text that a shell would change if a script did not quote it."""

TORCHRUN_REPORT = """\
Global Checkpoint Load : Rank : 0 : Start time : 1795677141.638s : Time spent in load: 0.133s
============================================================
recipes.core.worker FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-01-31_{killed_at}
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
"""End of a log: rank 0 failed, and rank 1 was killed at ``killed_at``."""

RunStage = Callable[[str], str]
"""Type of the fixture ``run``."""


@pytest.fixture
def stage(plan: MakePlan) -> PlannedStage:
    """A planned distillation on two devices, with variables of its own. Its directory exists."""
    stage = stage_named(plan(), "distill")
    stage.directory.mkdir(parents=True)
    return with_resources(stage, devices=2, env={"FROM_STAGE": "s", "BOTH": "stage"})


def with_resources(stage: PlannedStage, **resources: object) -> PlannedStage:
    """Returns the stage with these fields of ``Resources``; all other fields get their defaults."""
    config = replace(stage.config, resources=Resources(**resources))  # type: ignore[arg-type]
    return replace(stage, config=config)


def plan_of(stage: PlannedStage) -> Plan:
    """Returns a plan with one stage."""
    return Plan(stage.directory.parent, None, (stage,))  # type: ignore[arg-type]


def environment(stage: PlannedStage, **env: str) -> dict[str, str]:
    """Returns the variables that the stage gets; ``env`` is the setting ``cluster.env``."""
    return local.environment(stage, local.LocalConfig(env=env))


def write_script(stage: PlannedStage, commands: str, patch: pytest.MonkeyPatch, **env: str) -> Path:
    """Writes the stage's ``run.sh``, and returns its path.

    The script calls the shell ``commands`` instead of Python; ``env`` is ``cluster.env``.
    """
    program = write_program(stage.directory / "bin" / "python", commands)
    patch.setattr(sys, "executable", str(program))
    local.write_scripts(plan_of(replace(stage, action="run")), local.LocalConfig(env=env))
    return stage.directory / local.SCRIPT


@pytest.fixture
def run(stage: PlannedStage, monkeypatch: pytest.MonkeyPatch) -> RunStage:
    """Runs shell commands as the stage; returns its error, or an empty text if it succeeds."""

    def run(commands: str) -> str:
        write_script(stage, commands, monkeypatch, GREETING="hello")
        try:
            with Follower(stage, Console(file=StringIO())) as follower:
                local.run(stage, follower)
        except RecipeError as error:
            return str(error)
        return ""

    return run


def test_torchrun_starts_only_stages_of_several_ranks(
    stage: PlannedStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(stage.directory / "config.yaml")
    worker = ["-m", "recipes.core.worker", "recipes.stages.distill", config]
    command = local.command(stage, "python")
    assert command[:3] == ["python", "-m", "torch.distributed.run"]
    assert {"--nproc-per-node=2", "--standalone"} <= {*command}
    assert command[-4:] == worker
    monkeypatch.setenv("WORLD_SIZE", "8")  # as if the launcher ran in a job of several ranks
    single_rank = with_resources(stage)
    assert local.command(single_rank, "python") == ["python", *worker]
    # Lightning ignores Slurm in a job with the name ``interactive``.
    rank_env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "SLURM_JOB_NAME": "interactive"}
    assert rank_env.items() <= environment(single_rank).items()
    assert not rank_env.keys() & environment(stage).keys()  # torchrun sets the variables


def test_environment_has_the_users_variables_and_divides_the_cores(
    stage: PlannedStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert environment(stage, FROM_CLUSTER="c", BOTH="cluster") == {
        "PYTHONPATH": f"{stage.code_dir}{os.pathsep}/mine",
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(max(1, cores() // 2)),  # the stage has two ranks
        "FROM_CLUSTER": "c",
        "FROM_STAGE": "s",
        "BOTH": "stage",  # the stage's value replaces the cluster's
    }
    assert environment(stage, OMP_NUM_THREADS="3")["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("PYTHONPATH")
    many_devices_env = environment(with_resources(stage, devices=4096))  # more devices than cores
    assert many_devices_env == {
        "PYTHONPATH": str(stage.code_dir),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # as on a machine with one core
    try:
        assert environment(with_resources(stage))["OMP_NUM_THREADS"] == "1"
    finally:
        os.sched_setaffinity(0, allowed)


def test_script_starts_the_command_in_the_launchers_directory(
    stage: PlannedStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake interpreter prints its working directory, its arguments and ``AWKWARD``."""
    (tmp_path / "here it is").mkdir()
    monkeypatch.chdir(tmp_path / "here it is")
    commands = 'pwd -P; printf "%s\\n" "$@"; printf "%s" "$AWKWARD"'
    script = write_script(stage, commands, monkeypatch, AWKWARD=AWKWARD)
    done = subprocess.run([script], cwd="/", capture_output=True, text=True, check=True)
    expected = [os.path.realpath("."), *local.command(stage, sys.executable)[1:], AWKWARD]
    assert done.stdout == "\n".join(expected)


def test_stage_that_writes_its_manifest_has_succeeded(
    stage: PlannedStage, complete: Complete, run: RunStage
) -> None:
    complete(plan_of(stage))
    manifest = stage.directory / MANIFEST
    manifest.rename(stage.directory / "new")  # the stage moves it back, as if it wrote a new one
    assert run(f'mv "{stage.directory}/new" "{manifest}"; echo "$GREETING"; echo bad >&2') == ""
    [log] = (stage.directory / "logs").iterdir()
    assert log.read_text().splitlines() == ["hello", "bad"]


@pytest.mark.parametrize("exit_status", [0, 7])
def test_stage_without_a_manifest_has_failed(
    stage: PlannedStage, run: RunStage, exit_status: int
) -> None:
    """The message has the end of the stage's log, not the error of an earlier start."""
    record_failure(stage.directory, "an old problem")
    message = run(f"seq 1 9; echo boom >&2; exit {exit_status}")
    assert message.startswith("stage distill failed: it ended without a message")
    _, *shown_lines = [line.strip() for line in message.splitlines()]
    [log] = (stage.directory / "logs").iterdir()
    assert shown_lines == ["6", "7", "8", "9", "boom", f"log: {log}"]  # the log's last five lines


@pytest.mark.parametrize("forced", [False, True])
def test_stage_that_writes_no_new_manifest_has_failed(
    stage: PlannedStage, complete: Complete, run: RunStage, forced: bool
) -> None:
    """A forced stage runs although an old manifest has its fingerprint; another stage has an old
    manifest of another fingerprint. Neither manifest is a result of this start.
    """
    complete(plan_of(stage if forced else replace(stage, fingerprint="old")))
    assert "distill failed" in run("exit 0")


@pytest.mark.parametrize(
    ("signal", "expected"),
    [("KILL", "killed by SIGKILL: out of memory (the kernel's log"), ("TERM", "ended by SIGTERM")],
)
def test_error_names_the_signal_that_ended_a_stage(
    run: RunStage, signal: str, expected: str
) -> None:
    assert expected in run(f"kill -{signal} $$")


@pytest.mark.parametrize(
    ("killed_at", "expected"),
    [
        # 1 s after rank 0 failed. torchrun would wait 30 s, so it did not kill rank 1.
        ("06:00:01", "rank 1 was killed by SIGKILL: out of memory"),
        # 31 s after rank 0 failed: torchrun killed rank 1.
        ("06:00:31", "lost its connection\n  log: "),
    ],
)
def test_error_names_a_killed_rank_unless_torchrun_killed_it(
    stage: PlannedStage, run: RunStage, killed_at: str, expected: str
) -> None:
    """Rank 0 records a lost connection; only torchrun's report in the log names rank 1.

    After a rank fails, torchrun waits 30 s and then kills the other ranks.
    """
    report = TORCHRUN_REPORT.format(killed_at=killed_at)
    work, outcome = stage.directory / WORK, {"stopped": False, "error": "lost its connection"}
    record_error = f"mkdir '{work}'; printf '{json.dumps(outcome)}' > '{work}/outcome.json'"
    message = run(f"{record_error}\ncat <<'END'\n{report}END\nexit 1")
    assert message.startswith(f"stage distill failed: {expected}")


def test_every_start_has_its_own_log(
    stage: PlannedStage, run: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a log is the time of the start. Here all starts have the same time."""
    monkeypatch.setattr(stage_process.time, "strftime", lambda form: "now")
    for number in range(3):
        run(f"echo {number}; exit 1")
    logs = {log.name: log.read_text() for log in (stage.directory / "logs").iterdir()}
    assert logs == {"now.log": "0\n", "now-2.log": "1\n", "now-3.log": "2\n"}


def test_stages_that_share_imports_require_a_gpu_if_one_of_them_does(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stage that the fork server can start, ``prepare_data``, uses no GPU."""
    stages = [
        replace(stage, action="run")
        for stage in plan("hardware=h100", "skip_rules=[memory,disk]").stages
        if stage.name in ("prepare_data", "distill")
    ]
    servers = []

    @contextmanager
    def fork_server(modules: object, env: dict[str, str], log: Path) -> Iterator[None]:
        servers.append(env)
        yield

    monkeypatch.setattr(local, "fork_server", fork_server)
    monkeypatch.setattr(local, "run_all", lambda *arguments: True)
    whole_plan = replace(plan_of(stages[0]), stages=tuple(stages))
    local.start(whole_plan, local.LocalConfig(), None, None)  # type: ignore[arg-type]
    assert [env[NEEDS_GPU] for env in servers] == ["h100"]


def test_gpus_and_host_memory_of_this_machine_are_compared_with_what_stages_need(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's stages with GPUs have 8 ranks. Its training has 12 bytes of state per weight."""
    planned = plan("hardware=h100", "engine=null", recipe="recipe=qwen3_8b_depth_2.5b")

    def problems(gpus: int, memory: float) -> dict[str, list[str]]:
        monkeypatch.setattr(local, "counted_gpus", lambda: gpus)
        monkeypatch.setattr(local, "physical_memory", lambda: memory)
        found: dict[str, list[str]] = {}
        for problem in local.problems(planned, local.LocalConfig()):
            found.setdefault(problem.rule.name, []).append(problem.what)
        return found

    assert problems(gpus=0, memory=1e13) == {}  # the number of GPUs is not known
    assert problems(gpus=8, memory=1e13) == {}
    too_few = problems(gpus=4, memory=1e13)
    assert too_few.keys() == {"gpus"}
    assert "score needs 8 GPUs, but this machine has 4" in too_few["gpus"]
    [message] = problems(gpus=8, memory=1e11)["host-memory"]
    assert message.startswith("distill takes ")
    assert message.endswith("GB of host memory to save a checkpoint, but this machine has 100 GB")
