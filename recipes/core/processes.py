"""Processes of a stage: that none outlives its parent, how one ended, what it takes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/dxg")
"""Of Linux, and of Linux in Windows."""


def ended_by(status: int | None) -> str | None:
    """What is to be said of a process that a signal ended, by its negative exit status."""
    if status is None or status >= 0:
        return None
    name = signal.Signals(-status).name
    if -status == signal.SIGKILL:
        return f"killed by {name}: out of memory (the kernel's log, dmesg, says so), or by someone"
    return f"ended by {name}"


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, so that ``kill -9`` leaves no orphan.

    An orphaned rank would go on writing into the directory that the next run uses.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def children_die_with_this() -> None:
    """The same for every process that is forked from this one or from such a child."""
    forking = 0

    def before() -> None:
        nonlocal forking
        forking = os.getpid()

    def in_child() -> None:
        die_with_parent()
        if os.getppid() != forking:  # which died before it could be said
            os._exit(1)

    os.register_at_fork(before=before, after_in_child=in_child)


def cores() -> int:
    """Those that this process may use: a container, a job or ``taskset`` may leave it some only."""
    return len(os.sched_getaffinity(0))


def leave_out_trackers() -> None:
    """Keeps Megatron from importing wandb, which it would where that is installed, for nothing.

    Trackers are the launcher's. An import takes time, and makes folders in the temporary one that a
    process which is killed leaves there.
    """
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]


def expect_no_gpu() -> None:
    """Where there is none, names an architecture to compile for, which Megatron asks GPUs for.

    It compiles a part of itself when it is imported, and copes if that fails; but with a CUDA build
    of torch, CUDA's compiler and no GPU it ends with an IndexError before it tries.
    """
    if not any(Path(device).exists() for device in NVIDIA_DEVICES):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")


def return_free_memory() -> None:
    """Gives back to Linux what glibc holds and nobody uses, wherever in its heap that is.

    It keeps pieces that are too small for what is asked for next, and all there is where
    ``MALLOC_TRIM_THRESHOLD_`` says so, as on a CPU, so that the next step need not ask again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim:
        trim(0)


def peak_memory_bytes() -> int:
    """Peak resident memory of this program alone.

    Not ``ru_maxrss``: Linux starts that at the size of the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    [kibibytes] = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kibibytes) * 1024


# Megatron's checkpoint writer starts processes that import the stage's module again; ``kill -9`` of
# a rank would leave them behind for good.
if "--multiprocessing-fork" in sys.orig_argv:
    die_with_parent()
    leave_out_trackers()
