"""Finds the device that models run on, and selects the GPU and the cores of a rank.

Code that depends on the device calls ``device()``. All other code is the same on CPU and GPU.
"""

from __future__ import annotations

import contextlib
import gc
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other, for example while one rank writes a model."""
PCI_DEVICES = Path("/sys/bus/pci/devices")
QUERIES_AT_ONCE = 128
"""Number of queries in a block of the backward pass of ``training_layers.attend_in_blocks``. It is
defined here for plans, which must not import torch."""


def device() -> str:
    """Returns the device that models run on: ``cuda``, or ``cpu`` on a machine without a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def collective_backend() -> str:
    """Returns the backend of ``torch.distributed``."""
    return "nccl" if device() == "cuda" else "gloo"


def select_gpu() -> torch.device | None:
    """Selects this rank's GPU and the cores near it; returns ``None`` on a machine without a GPU.

    By default, PyTorch uses the first GPU on every rank. torchrun's ``--numa-binding`` would select
    cores, but it needs numactl in the image and fails if a job may not use the cores near a GPU.
    """
    import torch

    if device() == "cpu":
        return None
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(gpu)
    properties = torch.cuda.get_device_properties(gpu)
    domain, bus, slot = (
        getattr(properties, f"pci_{name}_id") for name in ("domain", "bus", "device")
    )
    address = f"{domain:04x}:{bus:02x}:{slot:02x}.0"
    bind_to_near_cores(PCI_DEVICES / address, ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return gpu


def bind_to_near_cores(pci_device: Path, ranks: int) -> None:
    """Binds this process to the cores near a device, if there are enough of them.

    Args:
        pci_device: The device's folder in ``/sys``. If it lists no cores, the binding stays.
        ranks: Number of processes that share this process's cores. The near cores are enough if
            they are at least this process's fair share of the cores, 1 / ``ranks``.
    """
    try:
        cpu_list = (pci_device / "local_cpulist").read_text(encoding="ascii").strip()
    except OSError:
        return
    # The file has a text such as "0-3,8,10-11".
    spans = [span.partition("-") for span in cpu_list.split(",") if span]
    cores = {c for first, _, last in spans for c in range(int(first), int(last or first) + 1)}
    allowed = os.sched_getaffinity(0)
    near = cores & allowed
    if near == allowed or len(near) * ranks < len(allowed):
        return
    for thread in Path("/proc/self/task").iterdir():  # also threads that were started by imports
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(int(thread.name), near)


def release_cached_memory() -> None:
    """Frees GPU memory that PyTorch's allocator caches."""
    import torch

    gc.collect()
    if device() != "cpu":
        torch.cuda.empty_cache()


class FakeStream:
    """Replaces CUDA's streams and events without a GPU: operations run in order, so none waits."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *error: object) -> None: ...
