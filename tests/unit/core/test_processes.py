"""Tests that children die with their parent, that free memory is returned, and import setup."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from recipes.core.files import REPO_ROOT
from recipes.core.processes import death_message, interrupts_delayed

PARENT = """
import os, time
from recipes.core.processes import make_forks_die_with_parent
os.register_at_fork(after_in_child=lambda: time.sleep({delay}))
make_forks_die_with_parent()
if os.fork() == 0:
    time.sleep({delay})
    os.fork()
    time.sleep(60)
time.sleep({lifetime})
os._exit(0)
"""
"""A program that forks a child, which forks another one, and ends after ``lifetime`` seconds.

Each fork sleeps for ``delay`` seconds before it calls ``die_with_parent``.
"""
FREE_200_MB = """
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
"""A program that frees 200 MB below a block in use, and then calls ``return_free_memory``.

It prints the resident memory before this call, divided by that after it.
"""


def test_free_memory_is_returned() -> None:
    # These variables make malloc keep all free memory in the heap.
    variables = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    completed = subprocess.run(
        [sys.executable, "-c", FREE_200_MB], env=os.environ | variables, cwd=REPO_ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # Python itself takes much less than 100 MB, and (200 + 100) / 100 = 3.
    assert float(completed.stdout) > 3


@pytest.mark.parametrize(
    ("delay", "lifetime"),
    [(0, 1), (2, 0.5)],
    ids=["parent dies later", "parent dies during the fork"],
)
def test_children_die_with_their_parent(delay: float, lifetime: float) -> None:
    """All processes hold the pipe's write end, so the pipe closes when the last process ends."""
    read_end, write_end = os.pipe()
    program = PARENT.format(delay=delay, lifetime=lifetime)
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, pass_fds=[write_end], cwd=REPO_ROOT)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        assert pipe.read() == ""  # returns when the pipe closes
    assert time.monotonic() - start < 30  # orphans would live for 60 seconds


IMPORTS = """
import os, sys
from recipes.core.processes import prepare_imports
prepare_imports()
import torch.utils.cpp_extension as extension
# Nothing may be compiled, because a compilation could wait for the lock of a killed process.
extension.load_inline = lambda **_: sys.exit("compiles")
import megatron.core.inference.contexts.dynamic_context as context
assert not context.has_unified_memory
assert "wandb" not in {name for name, module in sys.modules.items() if module}
assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
"""


def test_an_import_of_megatron_compiles_nothing() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, cwd=REPO_ROOT)


def test_an_interrupt_is_raised_after_the_block() -> None:
    signals, completed = (signal.SIGINT, signal.SIGTERM), []
    handlers = [signal.getsignal(each) for each in signals]

    def interrupt() -> None:
        with interrupts_delayed():
            signal.raise_signal(signal.SIGINT)
            completed.append("block")

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert completed
    assert [signal.getsignal(each) for each in signals] == handlers


def test_the_status_of_a_killed_container_is_that_of_a_killed_process() -> None:
    """Docker and shells add 128 to the signal's number."""
    assert death_message(-signal.SIGKILL) is not None
    assert death_message(128 + signal.SIGKILL) == death_message(-signal.SIGKILL)
    # No signal has number 0 or 127. glibc reserves number 33.
    assert [death_message(status) for status in (None, 0, 1, 128, 128 + 33, 255)] == [None] * 6
