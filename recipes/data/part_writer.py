"""Writes parts of a text as Megatron's indexed datasets, in constant memory."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from megatron.core.datasets.indexed_dataset import _IndexWriter

from recipes.core.errors import RecipeError

PartSize = tuple[int, int]
"""Bytes and documents."""
LEARNT = "learnt"
"""Suffix of a file with one byte per token: whether its prediction counts in the loss."""
LENGTHS = "lengths"
"""Suffix of a file with every document's number of tokens (int32), from which the index is made."""
BLOCK = 1 << 16
"""Documents per block while an index is written."""


class PartWriter:
    """Writes several parts, one document at a time, in constant memory.

    Megatron's ``IndexedDatasetBuilder`` makes the same files, but keeps all lengths in memory and
    cannot append to files of known ``sizes``. If ``marked``, writes ``LEARNT`` files, too.
    """

    def __init__(
        self,
        folder: Path,
        parts: Iterable[str],
        sizes: Mapping[str, PartSize] | None = None,
        *,
        marked: bool = False,
    ) -> None:
        before = sizes or {}
        self.sizes: dict[str, PartSize] = {p: (*before.get(p, (0, 0)),) for p in parts}
        """Bytes and documents of each part."""
        self._folder = folder
        self._files = {
            part: (
                _opened(_path(folder, part, "bin"), size),
                _opened(_path(folder, part, LENGTHS), 4 * documents),
            )
            for part, (size, documents) in self.sizes.items()
        }
        self._learnt = {
            part: _opened(_path(folder, part, LEARNT), size // 4)
            for part, (size, _) in self.sizes.items()
            if marked
        }

    def add(
        self, part: str, ids: Sequence[int] | np.ndarray, learnt: np.ndarray | None = None
    ) -> None:
        """Appends one document; by default the predictions of all tokens but the first count."""
        tokens, lengths = self._files[part]
        if part in self._learnt:
            marks = np.arange(len(ids)) > 0 if learnt is None else learnt
            self._learnt[part].write(marks.tobytes())
        size, documents = self.sizes[part]
        written = tokens.write(np.asarray(ids, dtype=np.int32).tobytes())
        lengths.write(struct.pack("<i", len(ids)))
        self.sizes[part] = (size + written, documents + 1)

    def flush(self) -> None:
        """Writes everything to disk."""
        for file in self._all():
            file.flush()
            os.fsync(file.fileno())

    def _all(self) -> Iterator[BinaryIO]:
        yield from (file for files in self._files.values() for file in files)
        yield from self._learnt.values()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for file in self._all():
            file.close()
        for part in self._files:
            if kind is None:
                _write_index(self._folder, part, self.sizes[part][1])


def _path(folder: Path, part: str, suffix: str) -> Path:
    return folder / f"{part}.{suffix}"


def _opened(path: Path, size: int) -> BinaryIO:
    """Opens a file to append to, truncated to ``size`` bytes; refuses a shorter one."""
    path.touch()
    if path.stat().st_size < size:
        raise RecipeError(f"{path} is shorter than its record.", f"delete {path.parent}")
    os.truncate(path, size)
    return path.open("ab")


def _write_index(folder: Path, part: str, documents: int) -> None:
    """Writes ``.idx`` as Megatron's ``_IndexWriter`` does, one block of lengths at a time."""
    lengths = _path(folder, part, LENGTHS)
    with _IndexWriter(str(_path(folder, part, "idx")), np.int32) as writer:
        file = writer.idx_writer
        file.write(struct.pack("<QQ", documents, documents + 1))
        with lengths.open("rb") as source:
            shutil.copyfileobj(source, file)
        end = 0
        for start in range(0, documents, BLOCK):
            sizes = 4 * np.fromfile(lengths, np.int32, BLOCK, offset=4 * start).astype(np.int64)
            ends = end + np.cumsum(sizes)
            file.write((ends - sizes).tobytes())
            end = int(ends[-1])
        for start in range(0, documents + 1, BLOCK):
            stop = min(start + BLOCK, documents + 1)
            file.write(np.arange(start, stop, dtype=np.int64).tobytes())
