"""Tests the machine: every module can be imported, the device computes, and Triton compiles."""

from __future__ import annotations

import importlib
import platform
import time
from pathlib import Path

import pytest
import torch

from recipes.core.files import REPO_ROOT
from recipes.core.versions import git_sha, pins
from tests.gpu.small import record

SIZE, REPEATS = 8192, 10
"""Rows and columns of the matrices, and number of timed matrix multiplications."""


def test_every_module_imports(results: Path) -> None:
    imported = []
    for root in ("nemo_convert", "recipes", "launch"):
        for file in sorted((REPO_ROOT / root).rglob("*.py")):
            name = ".".join(file.relative_to(REPO_ROOT).with_suffix("").parts)
            if not name.endswith(("__init__", "__main__")):
                importlib.import_module(name)
                imported.append(name)
    record(
        results,
        "versions",
        modules=len(imported),
        machine=platform.machine(),
        commit=git_sha(),
        versions={pin.name: pin.installed for pin in pins()},
    )


def test_a_device_computes(results: Path) -> None:
    if not torch.cuda.is_available():
        reason = "was built without CUDA" if torch.version.cuda is None else "finds none"
        pytest.fail(f"no CUDA device: PyTorch {torch.__version__} {reason}", pytrace=False)
    properties = torch.cuda.get_device_properties(0)
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = a @ b
    expected = a[:64].float().cpu() @ b.float().cpu()  # the CPU computes only the first 64 rows
    # The elements are sums of 8192 products, with a standard deviation of 90.
    torch.testing.assert_close(product[:64].float().cpu(), expected, rtol=2e-2, atol=2)
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in range(REPEATS):
        a @ b
    torch.cuda.synchronize()
    flops_per_second = 2 * SIZE**3 * REPEATS / (time.monotonic() - start)
    record(
        results,
        "device",
        name=properties.name,
        memory_bytes=properties.total_memory,
        capability=f"{properties.major}.{properties.minor}",
        devices=torch.cuda.device_count(),
        cuda=torch.version.cuda,
        bf16_flops_per_second=flops_per_second,
    )


def test_triton_compiles() -> None:
    """``torch.compile`` uses Triton on a GPU, also for Megatron's fused functions."""

    def elementwise(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * x + 1

    x = torch.randn(1000, device="cuda")
    torch.testing.assert_close(torch.compile(elementwise)(x), elementwise(x))
