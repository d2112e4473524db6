"""The numbers that models are held and computed in. Torch-free until a type is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PRECISIONS = ("bf16-mixed", "32")


def dtype_of(precision: str) -> torch.dtype:
    """Type of weights and activations."""
    import torch

    return torch.bfloat16 if precision == "bf16-mixed" else torch.float32
