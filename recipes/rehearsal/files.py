"""Files of safetensors, which hold real numbers: zeros where a rehearsal writes them."""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

_safe_open = safetensors.safe_open
_save_file, _load_file = safetensors.torch.save_file, safetensors.torch.load_file


class _Opened:
    """A file whose tensors are read for real; otherwise what ``safe_open`` gives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._file = _safe_open(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def get_tensor(self, name: str) -> Tensor:
        """One tensor."""
        with unset_fake_temporarily():
            read: Tensor = self._file.get_tensor(name)
        return read


def stand_in() -> None:
    """Replaces reading and writing, for good; before what imports the functions by name."""
    safetensors.torch.save_file, safetensors.torch.load_file = _save, _load
    setattr(safetensors, "safe_open", _Opened)


def _save(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
    with unset_fake_temporarily():
        zeros = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}
        _save_file(zeros, *args, **kwargs)


def _load(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    with unset_fake_temporarily():
        read: dict[str, Tensor] = _load_file(*args, **kwargs)
    return read
