"""What the machine can do at best: matrix products and copies, by timing them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

from nemo_convert.architecture import Architecture
from recipes.engines.results import MachineRates

REPEATS = 5
TOKENS = 1024
"""Rows of the matrix product that FLOP/s are measured with."""
COPY_BYTES = 1 << 28
"""Well beyond any cache."""


def best_seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Shortest of several runs, after one that warms up; other programs only make it longer."""

    def run() -> float:
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    run()
    return min(run() for _ in range(REPEATS))


def linear_rate(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: str = "cpu"
) -> float:
    """FLOP/s of a linear layer [tokens, inputs] → [tokens, outputs]."""
    x = torch.randn(tokens, inputs, dtype=dtype, device=device)
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
    return 2 * tokens * inputs * outputs / best_seconds(lambda: linear(x, weight), device)


def copy_rate(device: str = "cpu") -> float:
    """Bytes per second of a copy, each byte counted as read and as written."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / best_seconds(lambda: target.copy_(source), device)


def processor_name(device: str = "cpu") -> str:
    """Name of the GPU, or of the CPU as Linux gives it."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def measure(arch: Architecture, threads: int, device: str = "cpu") -> MachineRates:
    """Rates of a model's feed-forward layer and of memory."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    shape = (TOKENS, arch.hidden_size, arch.ffn_hidden_size)
    rates = MachineRates(
        cpu=processor_name(device),
        threads=threads,
        flops_per_second={
            f"{dtype}".removeprefix("torch."): linear_rate(*shape, dtype, device)
            for dtype in (torch.float32, torch.bfloat16)
        },
        bytes_per_second=copy_rate(device),
    )
    torch.set_num_threads(before)
    return rates
