"""Forks from a server that has imported the real libraries."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from launch.executors.local import PRELOADED
from recipes.core.files import REPO_ROOT
from recipes.core.fork_server import fork_module, fork_server, watch_child

STAGE = """
import json, os, sys, tempfile
there = {"torch", "transformers", "lightning", "megatron.core", "nemo.collections.llm"}
missing = sorted(there - sys.modules.keys())
threads = len(os.listdir(f"/proc/{os.getppid()}/task"))
import numpy, torch
torch.ones(512, 512) @ torch.ones(512, 512)
left = [n for n in os.listdir(tempfile.gettempdir()) if not n.startswith("torchinductor_")]
print(json.dumps({
    "missing": missing, "threads_at_fork": threads, "threads": torch.get_num_threads(),
    "own": len(os.listdir("/proc/self/task")), "numpy": numpy.random.random(),
    "torch": torch.rand(1).item(), "left": left, "distributed": torch.distributed.is_initialized(),
}))
"""


def test_stack_can_be_forked(tmp_path: Path) -> None:
    (tmp_path / "a_stage.py").write_text(STAGE)
    path = f"{REPO_ROOT}{os.pathsep}{tmp_path}"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    given = {"PYTHONPATH": path, "OMP_NUM_THREADS": "2", "TMPDIR": str(temporary)}
    environment = {**os.environ, **given}
    found = []
    with fork_server(PRELOADED, environment, tmp_path / "fork_server.log") as server:
        for number in range(2):
            log = tmp_path / f"{number}.txt"
            with log.open("wb") as output:
                process = fork_module(server, "a_stage", [str(tmp_path / "config.yaml")], output)
                assert process is not None, (tmp_path / "fork_server.log").read_text()
                with watch_child(server, process, output) as ended:
                    while not ended():
                        time.sleep(0.01)
            found.append(json.loads(log.read_text()))
    for generator in ("numpy", "torch"):
        assert len({one.pop(generator) for one in found}) == 2
    for one in found:
        assert one.pop("own") >= 2  # its own pool
        assert one == {
            "missing": [],
            "threads_at_fork": 1,
            "threads": 2,
            "distributed": False,
            "left": [],  # but for torch's cache: a kill would leave it
        }
