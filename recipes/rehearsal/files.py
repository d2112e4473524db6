"""Replaces functions of safetensors in rehearsals, whose tensors are fake: they have no values.

Saving writes a sparse file of zeros. Loading returns real tensors, with the file's values.
"""

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

from recipes.backend.patches import apply, patches, replace_with, wrap

Shapes = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""Maps names of tensors to (dtype, shape)."""


class _RealFile:
    """Wraps an open safetensors file, or one lazy tensor of it, to read real tensors in fake mode.

    Fake mode is torch's ``FakeTensorMode``, in which safetensors would return fake tensors.
    """

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _RealFile:
        return self

    def __exit__(self, *error: object) -> None:
        """Does nothing: the file is closed when its last reference is freed."""

    def __getitem__(self, index: Any) -> Tensor:
        with unset_fake_temporarily():
            tensor: Tensor = self._file[index]
        return tensor

    def get_tensor(self, name: str) -> Tensor:
        """Reads one tensor."""
        with unset_fake_temporarily():
            tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def get_slice(self, name: str) -> _RealFile:
        """Returns a tensor whose slices are read only on access."""
        return _RealFile(self._file.get_slice(name))


def install() -> None:
    """Replaces safetensors' functions for the rest of the process.

    Must run before other modules import these functions by name.
    """
    apply(PATCHES)


def _open(original: Any, *args: Any, **kwargs: Any) -> _RealFile:
    return _RealFile(original(*args, **kwargs))


def write_zeros(file: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a sparse safetensors file of zeros, in which only the header takes disk space.

    The library itself would write every byte. A file has the length of the header in 8 bytes, the
    header in JSON, and the data (https://huggingface.co/docs/safetensors).
    """
    dtype_names = {dtype: name for name, dtype in safetensors.torch._TYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0  # of the last tensor, in bytes from the start of the data
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": dtype_names[dtype],
            "shape": [*shape],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        output.truncate(8 + len(text) + end)  # extends the file without writing its data


def _save(
    tensors: Mapping[str, Tensor], file: Any, metadata: Mapping[str, str] | None = None
) -> None:
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_zeros(Path(file), shapes, metadata)


def _load(original: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    with unset_fake_temporarily():
        tensors: dict[str, Tensor] = original(*args, **kwargs)
    return tensors


NO_VALUES, FAKE_MODE = "tensors have no values", "fake mode is on, but real tensors are read"
PATCHES = patches(
    "safetensors",
    (".torch:save_file", NO_VALUES, "650f051ef93f", replace_with(_save)),
    (".torch:load_file", FAKE_MODE, "e4dd067a5239", wrap(_load)),
    (":safe_open", FAKE_MODE, "bfa8cd9502ef", wrap(_open)),
)
