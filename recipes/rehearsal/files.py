"""Replaces safetensors files in a rehearsal by sparse files of zeros."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

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


def write_zeros(file: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a sparse safetensors file of zeros, of which only the header takes disk space.

    The library cannot do this: it writes every byte. The format is documented at
    https://huggingface.co/docs/safetensors.
    """
    types = {dtype: name for name, dtype in safetensors.torch._TYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": types[dtype], "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as written:
        written.write(len(text).to_bytes(8, "little") + text)
        written.truncate(8 + len(text) + end)


def _save(
    tensors: Mapping[str, Tensor], file: Any, metadata: Mapping[str, str] | None = None
) -> None:
    write_zeros(Path(file), {n: (t.dtype, t.shape) for n, t in tensors.items()}, metadata)


def _load(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    with unset_fake_temporarily():
        read: dict[str, Tensor] = _load_file(*args, **kwargs)
    return read
