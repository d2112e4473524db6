"""The numbers that models are held and computed in. Torch-free until a type is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from recipes.core.constraints import one_of

if TYPE_CHECKING:
    import torch

PRECISIONS = ("bf16-mixed", "32")
Precision = Annotated[str, one_of(*PRECISIONS)]


def dtype_of(precision: str) -> torch.dtype:
    """Type of weights and activations."""
    import torch

    return torch.bfloat16 if precision == "bf16-mixed" else torch.float32


def number_type(precision: str) -> str:
    """Its name for people."""
    return "float32" if precision == "32" else "bfloat16"


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Float32 matrix products of numbers that are of ``dtype``: exact, and faster for bfloat16.

    A CPU's alone; CUDA's are as exact as ``NVIDIA_TF32_OVERRIDE`` and PyTorch's defaults make them.
    """
    import torch

    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        settings.fp32_precision = before
