"""Precisions of weights and activations. Imports torch only when a function needs it."""

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
    """Returns the name of ``dtype_of(precision)``. Does not import torch."""
    return "float32" if precision == "32" else "bfloat16"


@contextmanager
def float32_matmul_of(dtype: torch.dtype) -> Iterator[None]:
    """Lets a CPU run float32 GEMMs in bfloat16, which is faster, if ``dtype`` is bfloat16.

    ``dtype`` is that of the inputs before their conversion to float32. Converting them back to
    bfloat16 loses nothing, and sums stay in float32. CUDA ignores this setting.
    """
    import torch

    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        settings.fp32_precision = before
