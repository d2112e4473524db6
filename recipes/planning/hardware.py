"""Defines hardware profiles and detects this machine's hardware. Does not import torch."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from recipes.core.constraints import Bytes, Count, Positive, PositiveOrZero, Rate, between, one_of
from recipes.core.precision import Precision
from recipes.planning.transformer import Compute

DRIVER = Path("/proc/driver/nvidia/gpus")
"""Folder with an entry for each NVIDIA GPU. Listing it is fast; ``nvidia-smi`` takes seconds."""
WSL_DEVICE = Path("/dev/dxg")
"""Device file of all GPUs on WSL2, even of other vendors than NVIDIA. WSL2 has no ``DRIVER``."""
CPUINFO = Path("/proc/cpuinfo")
"""Linux's description of the processors."""
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Words in ``CPUINFO`` of x86 and Arm processors with instructions for bfloat16 GEMMs."""
ATTENTION_RATE = 0.6
"""FLOP/s of attention on a CPU in any precision, as a fraction of those of float32 GEMMs."""
LAYER_PASS_SECONDS = 4.5e-3
"""Time to start the operations of a forward pass through a layer on a CPU, with any number of
threads."""
STORAGE_BYTES_PER_SECOND = 5e8
"""Assumed rate at which a job writes to its storage, with all ranks together."""
CPU_PROFILES: dict[bool, dict[str, Any]] = {
    True: {
        "precision": "bf16-mixed",
        "flops_per_second": 4.0e11,
        "float32_flops_per_second": 1.9e11,
        "bytes_per_second": 3.3e10,
    },
    False: {
        "precision": "32",
        "flops_per_second": 2.0e9,
        "float32_flops_per_second": 1.75e11,
        "bytes_per_second": 2.5e10,
    },
}
"""Fastest precision, and rates measured on two cores of AMD EPYC processors.

The key says whether the processor has instructions for bfloat16 GEMMs. A processor without them
emulates these GEMMs, almost a hundred times slower than float32 GEMMs, so float32 is its fastest.
"""
UNKNOWN_CPU: dict[str, Any] = CPU_PROFILES[True] | {"precision": "32"}
"""Profile of CPUs that this machine cannot inspect, such as a cluster's nodes. Its precision is
float32, which every CPU supports."""


@dataclass
class Hardware:
    """A hardware profile. The defaults are for a CPU with bfloat16 GEMMs, see ``CPU_PROFILES``."""

    name: str = "cpu"
    """Name of the profile in tables and messages."""
    kind: Annotated[str, one_of("cpu", "gpu")] = "cpu"
    """``gpu``: each rank has a device. ``cpu``: the ranks of a node share its memory and FLOP/s."""
    flops_per_second: Rate = 4.0e11
    """FLOP/s of dense bfloat16 GEMMs: a GPU's peak, or the measured rate of a CPU's cores."""
    float32_flops_per_second: Rate = 1.9e11
    """FLOP/s of float32 GEMMs; for a GPU, without tensor cores."""
    measure: bool = False
    """Whether the plan measures this machine's FLOP/s and memory bandwidth; they are cached."""
    memory_bytes: Bytes | None = None
    """Memory of a device; by default this machine's."""
    bytes_per_second: Rate = 3.3e10
    """Memory bandwidth; for ``cpu``, of a copy, in which each byte counts twice: read and written.
    """
    bandwidth_fraction: Annotated[float, between(0.01, 10)] | None = 1.4
    """Fraction of ``bytes_per_second`` that operations between GEMMs reach; above 1 if caches hold
    some of their data. ``null`` if ``utilisation`` includes these operations."""
    link_bytes_per_second: Rate = 1.0e10
    """Bandwidth between devices of a node, in each direction."""
    network_bytes_per_second: Rate = 1.0e9
    """Bandwidth between nodes per device, in each direction."""
    utilisation: Annotated[float, between(0.01, 1)] = 1.0
    """Fraction of the peak FLOP/s that a training run reaches while it does not communicate."""
    price_per_hour: PositiveOrZero = 0.05
    """Dollars for a device, or for a CPU node; an assumption, to be replaced by yours."""
    precision: Precision = "bf16-mixed"
    """The fastest precision of a training run; the default of all training stages."""
    inference_precision: Precision = "32"
    """The default precision of all stages that compare models."""
    cuda_device_max_connections: Count | None = None
    """Value of ``CUDA_DEVICE_MAX_CONNECTIONS`` under tensor or context parallelism: 1 before
    Blackwell, to overlap communication, and 32 from Blackwell on, as in NeMo."""
    compute_capability: Positive | None = None
    """Version of a GPU's instructions, such as 9.0 for Hopper; without it, FP8 is not checked."""
    reserved_bytes: PositiveOrZero = 0.75e9
    """Memory of a process without a model: libraries, CUDA context, NCCL buffers."""

    @property
    def on_gpu(self) -> bool:
        """Whether a rank has its own device."""
        return self.kind == "gpu"

    def memory_of_rank(self, ranks_on_node: int) -> float:
        """Returns the bytes of memory that one rank may use. Ranks share a CPU node's memory."""
        memory = physical_memory() if self.memory_bytes is None else self.memory_bytes
        return memory if self.on_gpu else memory / ranks_on_node

    def link_rate(self, within_node: bool) -> float:
        """Returns the bytes per second between two devices, in each direction."""
        return self.link_bytes_per_second if within_node else self.network_bytes_per_second

    def compute_seconds(self, compute: Compute, bf16: bool, ranks_on_node: int = 1) -> float:
        """Returns the seconds that one rank takes for its work, without communication.

        GEMMs are in bfloat16 if ``bf16``, else in float32. Ranks share a CPU node's FLOP/s.
        """
        rate = self.utilisation * (self.flops_per_second if bf16 else self.float32_flops_per_second)
        if self.bandwidth_fraction is None:  # ``utilisation`` includes all other operations
            seconds = compute.flops / rate
        else:
            attention_rate = self.utilisation * self.float32_flops_per_second * ATTENTION_RATE
            bandwidth = self.bytes_per_second * self.bandwidth_fraction
            seconds = compute.gemm_flops / rate
            seconds += compute.blocked_attention_flops / attention_rate
            seconds += compute.bytes / bandwidth + LAYER_PASS_SECONDS * compute.layer_passes
        return seconds if self.on_gpu else seconds * ranks_on_node


def physical_memory() -> int:
    """Returns the bytes of memory of this machine; fewer if a container's limit is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit_file = Path("/sys/fs/cgroup/memory.max")  # bytes, or "max" for no limit
    limit = limit_file.read_text(encoding="utf-8").strip() if limit_file.is_file() else "max"
    return total if limit == "max" else min(total, int(limit))


def cpu_profile(name: str, here: bool = True) -> Any:
    """Returns the entry ``name`` of a CPU's profile, for example its ``precision``.

    If ``here`` is false, the CPU is not this machine's, and its profile is ``UNKNOWN_CPU``.
    """
    if not here:
        return UNKNOWN_CPU[name]
    has_bfloat16 = not BFLOAT16_FLAGS.isdisjoint(cpuinfo().split())
    return CPU_PROFILES[has_bfloat16][name]


def cpuinfo() -> str:
    """Returns Linux's description of this machine's processors; empty on other systems."""
    return CPUINFO.read_text(encoding="utf-8") if CPUINFO.is_file() else ""


def gpus_here() -> int:
    """Returns the number of this machine's NVIDIA GPUs; on WSL2, 1 for any number above 0."""
    is_wsl_with_gpu = WSL_DEVICE.exists() and shutil.which("nvidia-smi") is not None
    return counted_gpus() or int(is_wsl_with_gpu)


def counted_gpus() -> int:
    """Returns the number of this machine's NVIDIA GPUs; 0 if it is not known, as on WSL2."""
    return len(list(DRIVER.iterdir())) if DRIVER.is_dir() else 0
