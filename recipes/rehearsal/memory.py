"""Bytes on a device that is not there: what is alive, by kind, and how it was at the peak."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.rehearsal.fake_cuda import DEVICE

PASSING = ("activations", "logits")
BLOCK = 512
"""Bytes that CUDA's allocator rounds up to (``kMinBlockSize``)."""


@dataclass
class _Allocation:
    size: int
    kind: str


class MemoryTracker(TorchDispatchMode):
    """Counts what operations allocate on the device, until it is let go.

    What is not said to be something else with ``name`` or ``making`` is a logit, where its last
    dimension is a rank's part of the vocabulary, or else an activation.

    Args:
        vocabulary: A rank's part of the vocabulary, padded.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._made: str | None = None
        self._live: dict[int, _Allocation] = {}
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._total = self._highest = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, Tensor) and tensor.device == DEVICE:
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        wide = tensor.dim() > 0 and tensor.shape[-1] == self._vocabulary
        kind = self._made or ("logits" if wide else "activations")
        self._live[key] = _Allocation(size, kind)
        weakref.finalize(storage, self._let_go, key)
        self._count(kind, size)

    def _let_go(self, key: int) -> None:
        gone = self._live.pop(key)
        self._count(gone.kind, -gone.size)

    def _count(self, kind: str, size: int) -> None:
        self.now[kind] += size
        self._total += size
        if self._total > self._highest:
            self._highest, self.peak = self._total, self.now.copy()

    def name(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Says of what kind tensors are that are alive, unless that is known."""
        for tensor in tensors:
            found = self._live.get(tensor.untyped_storage()._cdata)
            if found is not None and found.kind in PASSING:
                self.now[found.kind] -= found.size
                self.now[kind] += found.size
                found.kind = kind

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Says of what kind all is that is allocated meanwhile."""
        self._made = kind
        yield
        self._made = None

    def begin(self) -> None:
        """Forgets the peak so far."""
        self._highest, self.peak = self._total, self.now.copy()
