"""Measures the largest number of positions whose logits exist at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LogitsWatch(TorchDispatchMode):
    """Records the largest tensor over the vocabulary.

    Args:
        vocabulary: A size that no other axis has.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.max_positions = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and checks the size of its result."""
        result = func(*args, **(kwargs or {}))
        is_new = isinstance(result, Tensor) and not func.is_view
        if is_new and result.shape[-1:] == (self.vocabulary,):
            self.max_positions = max(self.max_positions, result.numel() // self.vocabulary)
        return result
