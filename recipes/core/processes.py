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
"""Option of Linux's ``prctl``: the signal that this process gets when its parent dies."""
MANAGED_MEMORY = "megatron.core.inference.unified_memory"
"""Megatron's module for CUDA managed memory."""


def death_message(exit_status: int | None) -> str | None:
    """Returns a message about the signal that killed a process; ``None`` if no signal did.

    ``exit_status`` is ``None`` if the process is still running.
    """
    if exit_status is None:
        return None
    # After signal 9, the status is -9 in Python, and 128 + 9 in a shell and for a docker container.
    number = -exit_status if exit_status < 0 else exit_status - 128
    if number not in {*signal.Signals}:
        return None
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return f"killed by {name}: out of memory (the kernel's log, dmesg, says so), or by a user"
    return f"ended by {name}"


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, even by ``kill -9``.

    An orphaned rank would continue to write into the directory that the next run uses.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def interrupts_delayed() -> Iterator[None]:
    """Handles SIGINT and SIGTERM after the block. Must be used in the main thread."""
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(each, lambda number, _: received.append(number)) for each in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
    for each in received:
        signal.raise_signal(each)


@contextmanager
def sigterm_ignored() -> Iterator[None]:
    """Ignores SIGTERM in a block that waits for a process to end.

    The command ``cancel`` sends SIGTERM repeatedly, and the handler's exception would end the wait.
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_forks_die_with_parent() -> None:
    """Makes every fork of this process, and every fork of a fork, die with its parent."""
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
    """Returns the number of cores to which this process is bound. Ignores docker's ``--cpus``."""
    return len(os.sched_getaffinity(0))


def prepare_imports() -> None:
    """Sets up this process before it imports torch and Megatron.

    - Megatron must not import wandb. That import takes time, and makes temporary folders that a
      killed process leaves behind.
    - Megatron must not import ``MANAGED_MEMORY``, which no stage uses. That import compiles a
      helper in the home directory, under a lock file. If the process is killed, the lock file
      stays, and every later import waits for it forever. The import also initialises CUDA, which
      does not work in a forked process.
    - float32 GEMMs must not use TensorFloat-32, which has 10 bits of mantissa. NGC images and
      TransformerEngine enable it, whatever PyTorch's settings are. ``NVIDIA_TF32_OVERRIDE=0``
      disables it, and cuBLAS reads this variable only once.
    - CUDA memory must not fragment when tensor sizes change. PyTorch reads
      ``PYTORCH_CUDA_ALLOC_CONF`` when CUDA starts, perhaps while TransformerEngine is imported. A
      value that the user has set stays.
    """
    # ``import wandb`` now raises ImportError.
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]
    stub = ModuleType(MANAGED_MEMORY)
    stub.has_unified_memory = False  # type: ignore[attr-defined]
    stub.create_unified_mempool = None  # type: ignore[attr-defined]
    sys.modules.setdefault(MANAGED_MEMORY, stub)  # replaces the module
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def return_free_memory() -> None:
    """Returns glibc's free memory to Linux.

    By default glibc keeps free blocks that lie between used blocks. Stages on a CPU set
    ``MALLOC_TRIM_THRESHOLD_`` for speed; there glibc keeps all free memory.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # only glibc has this function
        trim(0)


def peak_memory_bytes() -> int:
    """Returns this process's peak resident memory in bytes.

    ``ru_maxrss`` would be wrong: Linux initialises it with the size of the parent process.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    # The line of the peak (high-water mark) is, for example, "VmHWM:     1234 kB".
    [kibibytes] = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kibibytes) * 1024


# Megatron's checkpoint writer spawns processes, which Python starts with the option below. They
# import the main module, and thereby this one. They, too, must die with their parent.
if "--multiprocessing-fork" in sys.orig_argv:
    die_with_parent()
    prepare_imports()
