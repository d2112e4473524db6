"""Files of safetensors, which hold real numbers: zeros, in files that take no room."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from nemo_convert import hf
from nemo_convert.safetensors_header import header

_safe_open = safetensors.safe_open
_load_file = safetensors.torch.load_file
Shapes = Mapping[str, tuple[torch.dtype, Sequence[int]]]


class _Slice:
    """Part of a tensor that is read for real."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def __getitem__(self, index: Any) -> Tensor:
        with unset_fake_temporarily():
            read: Tensor = self._part[index]
        return read


class _Opened:
    """A file whose tensors are read for real; otherwise what ``safe_open`` gives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._file = _safe_open(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *error: object) -> None: ...

    def get_tensor(self, name: str) -> Tensor:
        """One tensor."""
        with unset_fake_temporarily():
            read: Tensor = self._file.get_tensor(name)
        return read

    def get_slice(self, name: str) -> _Slice:
        """One tensor, of which parts are read."""
        return _Slice(self._file.get_slice(name))


def stand_in() -> None:
    """Replaces reading and writing, for good; before what imports the functions by name."""
    safetensors.torch.save_file, safetensors.torch.load_file = _save, _load
    setattr(safetensors, "safe_open", _Opened)
    setattr(hf, "write_shard", _save)
    setattr(hf.Weights, "read", hf.Weights.mapped)


def write_zeros(file: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors of zeros, of which the disk keeps the header alone."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in shapes.items()}
    described = {n: (str(dtype), shape, sizes[n]) for n, (dtype, shape) in shapes.items()}
    begin = header(described, metadata)
    with file.open("wb") as written:
        written.write(begin)
        written.truncate(len(begin) + sum(sizes.values()))


def _save(
    tensors: Mapping[str, Tensor], file: Any, metadata: Mapping[str, str] | None = None
) -> None:
    write_zeros(Path(file), {n: (t.dtype, t.shape) for n, t in tensors.items()}, metadata)


def _load(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    with unset_fake_temporarily():
        read: dict[str, Tensor] = _load_file(*args, **kwargs)
    return read
