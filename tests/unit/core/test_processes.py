"""Settings of processes: their end, their memory, and preparations for imports."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.core import processes
from recipes.core.files import REPO_ROOT

PARENT = """
import os, time
from recipes.core.processes import children_die_with_this
os.register_at_fork(after_in_child=lambda: time.sleep({late}))
children_die_with_this()
if os.fork() == 0:
    time.sleep({late})
    os.fork()
    time.sleep(60)
time.sleep({lives})
os._exit(0)
"""


FREED = """
import gc
from recipes.core.processes import return_free_memory
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])
pieces = [bytes(10_000) for _ in range(20_000)]
last = bytes(10_000)
del pieces
before = resident()
return_free_memory()
print(before / resident())
"""


def test_free_memory_is_returned() -> None:
    """200 MB in the middle of the heap, which malloc keeps with these settings."""
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    done = subprocess.run(
        [sys.executable, "-c", FREED], env=os.environ | keep, cwd=REPO_ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) > 3


@pytest.mark.parametrize(
    ("late", "lives"), [(0, 1), (2, 0.5)], ids=["parent dies later", "parent dies during the fork"]
)
def test_children_die_with_their_parent(late: float, lives: float) -> None:
    """All processes hold the pipe's writing end, so it closes when the last one ends."""
    reading, writing = os.pipe()
    program = PARENT.format(late=late, lives=lives)
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, pass_fds=[writing], cwd=REPO_ROOT)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == ""
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("there", [True, False])
def test_without_a_gpu_an_architecture_to_compile_for_is_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool
) -> None:
    device = tmp_path / "nvidiactl"
    monkeypatch.setattr(processes, "NVIDIA_DEVICES", (str(device),))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if there:
        device.touch()
    processes.expect_no_gpu()
    assert ("TORCH_CUDA_ARCH_LIST" in os.environ) != there
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    processes.expect_no_gpu()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.6"
