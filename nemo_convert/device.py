"""The device that models run on, its collectives, and the cores near it.

A model is built and trained alike on a CPU and on GPUs: distributed optimizer, overlapped
collectives, reshardable and asynchronous checkpoints, every layout. The differences are where the
functions below are called, and in ``cpu_backend``.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other, for example for one that writes a model."""
PCI_DEVICES = Path("/sys/bus/pci/devices")
QUERIES_AT_ONCE = 128
"""Whose attention a CPU's training layers compute together on their way back."""


def device() -> str:
    """Returns ``cuda`` if this process sees a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def collectives() -> str:
    """Returns the backend of collectives."""
    return "nccl" if device() == "cuda" else "gloo"


def use_own_gpu() -> torch.device | None:
    """Selects this rank's GPU of the node, else all ranks would take the first; ``None`` on a CPU.

    The process moves to the cores near that GPU. torchrun's ``--numa-binding`` would need numactl
    in the image, and fails where a job may not use those cores.
    """
    import torch

    if device() == "cpu":
        return None
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(gpu)
    pci = torch.cuda.get_device_properties(gpu)
    address = f"{pci.pci_domain_id:04x}:{pci.pci_bus_id:02x}:{pci.pci_device_id:02x}.0"
    stay_near(PCI_DEVICES / address, ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return gpu


def stay_near(pci_device: Path, ranks: int) -> None:
    """Moves this process to the cores near a device, unless it would get less than its fraction.

    Args:
        pci_device: The device's folder in ``/sys``; nothing moves if it does not list cores.
        ranks: Ranks that share the cores that this process may use.
    """
    try:
        listed = (pci_device / "local_cpulist").read_text(encoding="ascii").strip()
    except OSError:
        return
    spans = [span.partition("-") for span in listed.split(",") if span]
    cores = {core for a, _, b in spans for core in range(int(a), int(b or a) + 1)}
    allowed = os.sched_getaffinity(0)
    near = cores & allowed
    if near == allowed or len(near) * ranks < len(allowed):
        return
    for thread in Path("/proc/self/task").iterdir():  # imports have started some
        os.sched_setaffinity(int(thread.name), near)


def own_layers() -> bool:
    """Whether models use Megatron's local layers and ours, because TransformerEngine is absent."""
    from megatron.core.models.gpt import gpt_layer_specs

    return device() == "cpu" or not gpt_layer_specs.HAVE_TE
