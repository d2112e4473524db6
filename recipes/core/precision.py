"""The numbers that models are held and computed in. Torch-free until a type is asked for."""

from __future__ import annotations

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
