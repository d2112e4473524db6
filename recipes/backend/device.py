"""Finds the device that models run on, and selects the GPU and the CPU cores of a rank.

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
"""Folder in which Linux lists, for each PCI device, the CPU cores near the device."""
QUERIES_AT_ONCE = 128
"""Number of queries per block in the backward pass of ``training_layers.attend_in_blocks``. It is
defined here because planning code reads it and must not import torch."""


def device() -> str:
    """Returns the device that models run on: ``cuda``, or ``cpu`` on a machine without a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def collective_backend() -> str:
    """Returns the backend of ``torch.distributed``."""
    return "nccl" if device() == "cuda" else "gloo"


def select_gpu() -> torch.device | None:
    """Selects this rank's GPU and the CPU cores near it.

    By default, PyTorch uses the first GPU on every rank. torchrun's ``--numa-binding`` would select
    cores, but it needs numactl in the image and fails if a job may not use the cores near a GPU.

    Returns:
        The GPU; ``None`` on a machine without a GPU.
    """
    import torch

    if device() == "cpu":
        return None
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(gpu)
    properties = torch.cuda.get_device_properties(gpu)
    domain, bus = properties.pci_domain_id, properties.pci_bus_id
    # A folder name in PCI_DEVICES, such as "0000:3b:00.0". The final 0 is the GPU's PCI function.
    address = f"{domain:04x}:{bus:02x}:{properties.pci_device_id:02x}.0"
    bind_to_near_cores(PCI_DEVICES / address, ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return gpu


def bind_to_near_cores(pci_device: Path, ranks: int) -> None:
    """Binds this process to the CPU cores near a device, if it may use enough of them.

    The near cores are enough if they are at least 1 / ``ranks`` of the cores that this process may
    use. Otherwise the process would get fewer cores than without a binding.

    Args:
        pci_device: The device's folder in ``PCI_DEVICES``. If it lists no cores, nothing changes.
        ranks: Number of processes that share this process's cores.
    """
    try:
        cpu_list = (pci_device / "local_cpulist").read_text(encoding="ascii").strip()
    except OSError:
        return
    cores: set[int] = set()
    for span in filter(None, cpu_list.split(",")):  # the text is, for example, "0-3,8,10-11"
        first, _, last = span.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    allowed_cores = os.sched_getaffinity(0)
    near_cores = cores & allowed_cores
    has_enough = len(near_cores) * ranks >= len(allowed_cores)
    if near_cores == allowed_cores or not has_enough:
        return
    # Imports have already started threads. A binding of the main thread would not change theirs.
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(int(thread.name), near_cores)


def release_cached_memory() -> None:
    """Deletes unreachable objects, and frees GPU memory that PyTorch's allocator caches."""
    import torch

    gc.collect()
    if device() != "cpu":
        torch.cuda.empty_cache()


class FakeStream:
    """Replaces CUDA streams and events on machines without a GPU.

    Operations run in order there, so waiting for a stream or an event does nothing. Every method
    returns this object.
    """

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's protocols, such as copying, must not find a method
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *error: object) -> None: ...
