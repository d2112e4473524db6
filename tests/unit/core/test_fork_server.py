"""Tests that stages are forked from a server that has imported their libraries."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launch.executors.local import may_fork
from recipes.core.fork_server import fork_module, fork_server, watch_child
from recipes.core.processes import death_message
from recipes.core.stage import Resources

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from launch.plan import Plan

HEAVY = """
import atexit, os, sys
assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
memory = bytearray(300_000_000)
del memory
atexit.register(lambda: print("exit of the import", flush=True))
"""
"""A library whose import takes 300 MB for a moment and registers an atexit handler.

A fork must neither report this peak nor call the handler. The assertion checks that TensorFloat-32
is off before libraries are imported.
"""
STAGE = """
import ctypes, json, os, sys
from recipes.core.processes import peak_memory_bytes
report = json.dumps({
    "preloaded": "heavy" in sys.modules, "argv": sys.argv[1:], "orig_argv": sys.orig_argv[1:],
    "main": sys.modules["__main__"].__spec__.name, "environment": dict(os.environ),
    "stdin": sys.stdin.read(), "directory": os.getcwd(), "peak": peak_memory_bytes(),
})
sys.stdout.write(report + "\\n")  # in one call: print may write a long line in two
ctypes.CDLL(None).puts(b"from C")
print("to stderr", file=sys.stderr)
"""
"""A stage that prints what it sees of its process, as JSON, and a line from C and to stderr."""
SLOW = "import os, time\nprint(os.getpid(), os.getppid(), flush=True)\ntime.sleep(600)\n"
"""A stage that prints its process id and that of its parent, the server, and then runs on."""
THREADED = """
import threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
"""
"""A library whose import starts a thread, which a fork would lose."""
CUDA = """
import os, sys
from types import SimpleNamespace
cuda, importer = SimpleNamespace(is_available=lambda: {gpu}), os.getpid()
cuda._is_in_bad_fork = lambda: os.getpid() != importer
sys.modules["torch"] = SimpleNamespace(cuda=cuda, default_generator=SimpleNamespace(seed=int))
"""
"""A library whose import replaces torch with a stub of a CUDA build.

In a fork, the stub says that CUDA was initialised before the fork.
"""


@pytest.fixture
def environment(tmp_path: Path, root: Path) -> dict[str, str]:
    """Writes the modules above. Returns environment variables for processes that import them."""
    modules = {"heavy": HEAVY, "a_stage": STAGE, "slow": SLOW, "threaded": THREADED}
    modules |= {"cuda": CUDA.format(gpu=True), "cuda_without_gpu": CUDA.format(gpu=False)}
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    # Unbuffered output would hide that a fork does not flush its buffers.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    variables["NVIDIA_TF32_OVERRIDE"] = "1"  # the server must import with 0 instead
    return {**variables, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}


def run_module(server: socket.socket, module: str, log: Path) -> None:
    """Runs a module in a fork of the server, and waits for its end."""
    with log.open("wb") as output:
        pidfd = fork_module(server, module, [str(log.parent / "config.yaml")], output)
        assert pidfd is not None
        with watch_child(server, pidfd, output) as has_ended:
            while not has_ended():
                time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:  # a zombie has ended, but its parent has not yet read its exit status
        return "(zombie)" not in Path("/proc", str(pid), "status").read_text()
    except FileNotFoundError:
        return False


def test_a_fork_equals_a_new_process(environment: dict[str, str], tmp_path: Path) -> None:
    logs = [tmp_path / "first.txt", tmp_path / "second.txt"]
    with fork_server(["heavy"], environment, tmp_path / "fork_server.log") as server:
        for log in logs:
            run_module(server, "a_stage", log)
    for log in logs:
        # The order of lines varies, because C and stderr have their own buffers. The key is False
        # for the JSON line, so that line is sorted first.
        json_line, *lines = sorted(log.read_text().splitlines(), key=lambda line: line[0] != "{")
        assert sorted(lines) == ["from C", "to stderr"]  # no "exit of the import"
        report: dict[str, Any] = json.loads(json_line)
        assert report.pop("preloaded")
        assert report.pop("peak") < 200e6  # bytes; importing ``heavy`` took 300 MB in the server
        arguments = [str(tmp_path / "config.yaml")]
        assert report == {
            "argv": arguments,
            "orig_argv": ["-m", "a_stage", *arguments],
            "main": "a_stage",
            "environment": environment,
            "stdin": "",
            "directory": os.getcwd(),
        }
    assert (tmp_path / "fork_server.log").read_text() == "exit of the import\n"


@pytest.mark.parametrize("victim", ["server", "stage", "watcher"])
def test_the_end_of_one_process_ends_server_and_stage(
    environment: dict[str, str], tmp_path: Path, victim: str
) -> None:
    log = tmp_path / "log.txt"
    with (
        fork_server(["heavy"], environment, tmp_path / "fork_server.log") as server,
        log.open("wb") as output,
    ):
        pidfd = fork_module(server, "slow", [str(tmp_path / "config.yaml")], output)
        assert pidfd is not None
        while not log.read_text().endswith("\n"):
            time.sleep(0.01)
        stage_pid, server_pid = map(int, log.read_text().split())
        if victim == "watcher":
            # The watcher is this process. An exception in its block terminates the stage.
            with pytest.raises(KeyboardInterrupt), watch_child(server, pidfd, output):
                raise KeyboardInterrupt
            assert not is_running(stage_pid)
        else:
            os.kill(server_pid if victim == "server" else stage_pid, signal.SIGKILL)
            with watch_child(server, pidfd, output) as has_ended:
                deadline = time.monotonic() + 120  # seconds; much more than a kill takes
                while not has_ended():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
    assert not is_running(stage_pid)
    assert not is_running(server_pid)
    last_lines = {
        "server": "killed with the process that it was forked from",
        "stage": death_message(-signal.SIGKILL),
        "watcher": "ended by SIGTERM",
    }
    assert log.read_text().splitlines()[1:] == [last_lines[victim]]  # after the process ids


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("threaded", "1 threads"),
        ("no_such_module", "ModuleNotFoundError"),
        ("cuda", "an import has initialised CUDA"),
    ],
)
def test_a_server_that_cannot_fork_logs_the_reason(
    environment: dict[str, str], tmp_path: Path, module: str, reason: str
) -> None:
    server_log, log = tmp_path / "fork_server.log", tmp_path / "log.txt"
    with fork_server([module], environment, server_log) as server, log.open("wb") as output:
        assert fork_module(server, "a_stage", [str(tmp_path / "config.yaml")], output) is None
    assert reason in server_log.read_text()


def test_without_a_gpu_a_cuda_build_can_be_forked(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with fork_server(["cuda_without_gpu"], environment, tmp_path / "fork_server.log") as server:
        run_module(server, "a_stage", tmp_path / "log.txt")
    # The stage has run.
    assert "from C" in (tmp_path / "log.txt").read_text()


def test_only_torch_stages_with_one_rank_and_no_variables_of_their_own_are_forked(
    plan: Callable[..., Plan],
) -> None:
    stages = {stage.name: stage for stage in plan().stages}

    def is_forked(name: str, **resources: Any) -> bool:
        stage = stages[name]
        config = replace(stage.config, resources=Resources(**resources))
        return may_fork(replace(stage, config=config))

    assert is_forked("distill")
    assert not is_forked("distill", env={"LD_PRELOAD": "a.so"})
    assert not is_forked("distill", devices=2)
    assert not is_forked("report")  # a report does not import torch
