"""Forks stages from a server that has imported the real libraries."""

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
preloaded = {"torch", "transformers", "lightning", "megatron.core", "nemo.collections.llm"}
missing = sorted(preloaded - sys.modules.keys())
server_threads = len(os.listdir(f"/proc/{os.getppid()}/task"))
import numpy, torch
torch.ones(512, 512) @ torch.ones(512, 512)
# The directory torchinductor_* is the cache of torch.compile, which may remain.
names = os.listdir(tempfile.gettempdir())
temporary_files = [name for name in names if not name.startswith("torchinductor_")]
print(json.dumps({
    "missing": missing, "server_threads": server_threads, "torch_threads": torch.get_num_threads(),
    "threads": len(os.listdir("/proc/self/task")), "numpy": numpy.random.random(),
    "torch": torch.rand(1).item(), "temporary_files": temporary_files,
    "distributed": torch.distributed.is_initialized(),
}))
"""
"""Module of a stage that prints what it inherits from the server. A fork copies only one thread, so
the server must have no others. ``numpy`` and ``torch`` are random numbers."""


def test_forks_inherit_libraries_but_no_threads_seeds_or_temporary_files(tmp_path: Path) -> None:
    (tmp_path / "a_stage.py").write_text(STAGE)
    python_path = f"{REPO_ROOT}{os.pathsep}{tmp_path}"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    variables = {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "2", "TMPDIR": str(temporary)}
    environment = {**os.environ, **variables}
    reports = []
    with fork_server(PRELOADED, environment, tmp_path / "fork_server.log") as server:
        for number in range(2):
            log = tmp_path / f"{number}.txt"
            with log.open("wb") as output:
                pidfd = fork_module(server, "a_stage", [str(tmp_path / "config.yaml")], output)
                assert pidfd is not None, (tmp_path / "fork_server.log").read_text()
                with watch_child(server, pidfd, output) as has_ended:
                    while not has_ended():
                        time.sleep(0.01)
            reports.append(json.loads(log.read_text()))
    for library in ("numpy", "torch"):  # each fork has its own seed
        assert len({report.pop(library) for report in reports}) == 2
    for report in reports:
        assert report.pop("threads") >= 2  # the fork has started its own pool of threads
        assert report == {
            "missing": [],
            "server_threads": 1,
            "torch_threads": 2,  # OMP_NUM_THREADS
            "distributed": False,
            "temporary_files": [],  # a killed stage would not delete them
        }
