"""Measures for how many positions (tokens) the largest tensor of logits is computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LogitsWatch(TorchDispatchMode):
    """Records in ``max_positions`` the positions of the largest new tensor [..., vocabulary].

    A tensor of shape [2, 3, vocabulary] has 6 positions. Views are not new tensors.

    Args:
        vocabulary: Size of the vocabulary. The last axis of no other tensor may have this size.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.max_positions = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and records the size of its result."""
        result = func(*args, **(kwargs or {}))
        is_new = isinstance(result, Tensor) and not func.is_view
        if is_new and result.shape[-1:] == (self.vocabulary,):
            self.max_positions = max(self.max_positions, result.numel() // self.vocabulary)
        return result
