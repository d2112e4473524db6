"""Makes processes die with their parent, prepares imports, measures memory, explains kills."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

PR_SET_PDEATHSIG = 1
MANAGED_MEMORY = "megatron.core.inference.unified_memory"


def death_message(exit_status: int | None) -> str | None:
    """Returns which signal killed a process; ``None`` if no signal did.

    After signal 9, Python's status is -9; that of shells, and of docker for a container, is 137.
    """
    number = 0 if exit_status is None else -exit_status if exit_status < 0 else exit_status - 128
    if number not in {*signal.Signals}:
        return None
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return f"killed by {name}: out of memory (the kernel's log, dmesg, says so), or by a user"
    return f"ended by {name}"


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, so that ``kill -9`` leaves no orphan.

    An orphaned rank would continue to write into the directory that the next run uses.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def sigterm_ignored() -> Iterator[None]:
    """Ignores SIGTERM in a block that waits for a process to end.

    ``cancel`` repeats SIGTERM, and the exception of a repeated one would end the wait.
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_forks_die_with_parent() -> None:
    """Calls ``die_with_parent`` in every process that this process or one of its forks forks."""
    parent = 0

    def before() -> None:
        nonlocal parent
        parent = os.getpid()

    def in_child() -> None:
        die_with_parent()
        if os.getppid() != parent:  # the parent died before the call above
            os._exit(1)

    os.register_at_fork(before=before, after_in_child=in_child)


def cores() -> int:
    """Returns the number of cores to which this process is bound. Ignores limits of CPU time."""
    return len(os.sched_getaffinity(0))


def prepare_imports() -> None:
    """Sets up this process before it imports torch and Megatron.

    - Megatron must not import wandb. That import takes time, and makes temporary folders that a
      killed process leaves behind.
    - Megatron must not import its module for CUDA managed memory, which no stage uses. That import
      compiles a helper in the home directory, under a lock file. A killed process leaves the lock,
      for which every later import then waits without limit. The import also initialises CUDA, which
      does not work in a forked process.
    - float32 GEMMs must not use TensorFloat-32, which has 10 bits of mantissa. NGC images and
      TransformerEngine enable it, whatever PyTorch's settings are. ``NVIDIA_TF32_OVERRIDE``
      disables it. cuBLAS reads this variable only once, so it is set here.
    """
    # ``import wandb`` now raises ImportError.
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]
    stub = ModuleType(MANAGED_MEMORY)
    stub.has_unified_memory = False  # type: ignore[attr-defined]
    stub.create_unified_mempool = None  # type: ignore[attr-defined]
    sys.modules.setdefault(MANAGED_MEMORY, stub)
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"


def return_free_memory() -> None:
    """Returns glibc's free memory to Linux, including free blocks in the middle of the heap.

    By default glibc keeps free blocks that lie between used blocks. Stages on a CPU set
    ``MALLOC_TRIM_THRESHOLD_`` for speed, with which glibc keeps all free memory.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # only glibc has it
        trim(0)


def peak_memory_bytes() -> int:
    """Returns this process's peak resident memory in bytes.

    ``ru_maxrss`` would be wrong: Linux initialises it with the size of the parent process.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    [kibibytes] = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kibibytes) * 1024


# Megatron's checkpoint writer spawns processes that import the main module, and thereby this one.
# These processes must die with their parent, too. Python starts spawned processes with this option.
if "--multiprocessing-fork" in sys.orig_argv:
    die_with_parent()
    prepare_imports()
