"""Precisions of weights and activations. The module imports torch only when needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from recipes.core.constraints import one_of

if TYPE_CHECKING:
    import torch

PRECISIONS = ("bf16-mixed", "32")
"""Lightning's names. "bf16-mixed" computes in bfloat16, "32" in float32."""
Precision = Annotated[str, one_of(*PRECISIONS)]


def dtype_of(precision: str) -> torch.dtype:
    """Returns the dtype of weights and activations."""
    import torch

    return torch.bfloat16 if precision == "bf16-mixed" else torch.float32


def dtype_name(precision: str) -> str:
    """Returns the name of ``dtype_of(precision)``, without an import of torch."""
    return "float32" if precision == "32" else "bfloat16"


@contextmanager
def float32_matmul_of(dtype: torch.dtype) -> Iterator[None]:
    """Lets a CPU run float32 GEMMs in bfloat16, which is faster, if ``dtype`` is bfloat16.

    Float32 inputs that were converted from bfloat16 lose nothing when they are converted back, and
    sums stay in float32. CUDA ignores this setting. There, ``NVIDIA_TF32_OVERRIDE`` and PyTorch's
    defaults decide.

    Args:
        dtype: The dtype of the inputs before their conversion to float32.
    """
    import torch

    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        settings.fp32_precision = before
