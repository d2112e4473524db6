"""Hardware profiles: what one device can do, as data from ``conf/hardware``. Torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from recipes.core.constraints import Bytes, Count, PositiveOrZero, Rate, between, one_of
from recipes.core.precision import Precision
from recipes.planning.work import ATTENTION_RATE, PASS_SECONDS, Work

DRIVER = Path("/proc/driver/nvidia/gpus")
"""Has an entry for each GPU; reading it takes no time, as ``nvidia-smi`` does."""
CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""What Linux calls bfloat16 products of x86 and Arm processors."""


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
"""Of two cores of an AMD EPYC with bfloat16 products, and of one without, which emulates them."""
ANY_CPU: dict[str, Any] = CPU_PROFILES[True] | {"precision": "32"}
"""For one that is not known: what all can train in, and rates for what its owner knows it has."""


@dataclass
class Hardware:
    """One device of a machine. The defaults are those of ``conf/hardware/cpu.yaml``."""

    name: str = "cpu"
    """For tables."""
    kind: Annotated[str, one_of("cpu", "gpu")] = "cpu"
    """``cpu``: the ranks of a node share its memory and its peak; ``gpu``: each has its own."""
    flops_per_second: Rate = 4.0e11
    """Dense bfloat16 products: the peak of a GPU; what all cores of a node reach for ``cpu``."""
    float32_flops_per_second: Rate = 1.9e11
    """The same of float32, on a GPU without tensor cores. (TransformerEngine multiplies in
    TensorFloat-32, which is several times as fast.)"""
    measure: bool = False
    """Whether the plan takes rates that it measures on the machine it runs on, once, instead."""
    memory_bytes: Bytes | None = None
    """Of a device; by default what this machine has."""
    bytes_per_second: Rate = 3.3e10
    """Memory bandwidth: of a copy, each byte read and written, for ``cpu``."""
    traffic_share: Annotated[float, between(0.01, 10)] | None = 1.4
    """Of it, what operations between products of matrices reach, one after the other: caches hold
    some of what they read, and what is changed in place is not read before it is written, too.
    None where they are a part of ``utilisation``."""
    link_bytes_per_second: Rate = 1.0e10
    """Between devices of a node, each way."""
    network_bytes_per_second: Rate = 1.0e9
    """Between nodes, for each device, each way."""
    utilisation: Annotated[float, between(0.01, 1)] = 1.0
    """Share of the peak that a training reaches while it computes, communication apart."""
    price_per_hour: PositiveOrZero = 0.05
    """Of a device (of the node for ``cpu``), in dollars: an assumption, override it with yours."""
    precision: Precision = "bf16-mixed"
    """What training is fastest in there; the default of every training stage."""
    inference_precision: Precision = "32"
    """What models are measured in there; the default of every stage that compares them."""
    cuda_device_max_connections: Count | None = None
    """The variable of that name under tensor or context parallelism. With 1, kernels start in the
    order they were given, which hides communication before Blackwell; from there on NeMo takes
    32, so that no stream waits for another."""
    reserved_bytes: PositiveOrZero = 0.75e9
    """What a process takes before it holds a model: libraries, CUDA context, buffers of NCCL."""

    @property
    def on_gpu(self) -> bool:
        """Whether a rank has a device of its own."""
        return self.kind == "gpu"

    def memory_of_rank(self, ranks_on_node: int) -> float:
        """Bytes that one of so many ranks on a node may use."""
        memory = physical_memory() if self.memory_bytes is None else self.memory_bytes
        return memory if self.on_gpu else memory / ranks_on_node

    def compute_seconds(self, work: Work, bf16: bool, ranks_on_node: int = 1) -> float:
        """Time of one of so many ranks on a node for its work, in bfloat16 or in float32."""
        rate = self.utilisation * (self.flops_per_second if bf16 else self.float32_flops_per_second)
        if self.traffic_share is None:
            seconds = work.flops / rate
        else:
            small = self.utilisation * self.float32_flops_per_second * ATTENTION_RATE
            traffic = work.bytes / (self.bytes_per_second * self.traffic_share)
            seconds = work.products / rate + work.square / small + traffic
            seconds += PASS_SECONDS * work.starts
        return seconds if self.on_gpu else seconds * ranks_on_node


def physical_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def cpu_profile(name: str, here: bool = True) -> Any:
    """Its ``precision`` or a rate, as of this machine's kind of processor.

    One without bfloat16 products emulates them, a hundred times as slowly: it trains in float32,
    and so does one that is not known, since stages run elsewhere than ``here``.
    """
    if not here:
        return ANY_CPU[name]
    return CPU_PROFILES[bool(BFLOAT16_FLAGS & set(cpuinfo().split()))][name]


def cpuinfo() -> str:
    """What Linux says of this machine's processors; nothing where it is another system."""
    return CPUINFO.read_text(encoding="utf-8") if CPUINFO.is_file() else ""


def gpus_here() -> int:
    """GPUs of this machine that NVIDIA's driver knows of."""
    return len(list(DRIVER.iterdir())) if DRIVER.is_dir() else 0
