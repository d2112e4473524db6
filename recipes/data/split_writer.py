"""Writes the splits of a dataset as Megatron's indexed datasets, in constant memory."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from megatron.core.datasets.indexed_dataset import _IndexWriter

from recipes.core.errors import RecipeError
from recipes.data.corpus import TOKEN_BYTES

SplitSize = tuple[int, int]
"""Bytes of tokens, and number of documents."""
LOSS_MASK = "loss_mask"
"""Suffix of a file with one byte per token: 1 if the token is a target of the loss."""
LENGTHS = "lengths"
"""Suffix of a file with the token count of each document (int32). The index is made from it."""
BLOCK = 1 << 16
"""Documents per block while an index is written."""


class SplitWriter:
    """Writes several splits, one document at a time, in constant memory.

    Megatron's ``IndexedDatasetBuilder`` makes the same files, but keeps all lengths in memory and
    cannot append to files.

    Args:
        folder: Folder of the files.
        splits: Names of the splits.
        sizes: Current size of each split, if files are continued; by default all splits are empty.
        masked: Whether to write ``LOSS_MASK`` files, too.
    """

    def __init__(
        self,
        folder: Path,
        splits: Iterable[str],
        sizes: Mapping[str, SplitSize] | None = None,
        *,
        masked: bool = False,
    ) -> None:
        self._folder = folder
        # JSON has turned the tuples of stored sizes into lists.
        self.sizes: dict[str, SplitSize] = {s: (*(sizes or {}).get(s, (0, 0)),) for s in splits}
        """Size of each split."""
        self._files: dict[tuple[str, str], BinaryIO] = {}
        """Open files by split and suffix."""
        for split, (size, documents) in self.sizes.items():
            # A token and a length take 4 bytes, an entry of the mask 1 byte.
            byte_counts = {"bin": size, LENGTHS: 4 * documents, LOSS_MASK: size // TOKEN_BYTES}
            for suffix, count in byte_counts.items():
                if masked or suffix != LOSS_MASK:
                    path = folder / f"{split}.{suffix}"
                    self._files[split, suffix] = _open_to_append(path, count)

    def add(
        self, split: str, ids: Sequence[int] | np.ndarray, loss_mask: np.ndarray | None = None
    ) -> None:
        """Appends one document; by default all its tokens but the first are targets of the loss."""
        if mask_file := self._files.get((split, LOSS_MASK)):
            mask = np.arange(len(ids)) > 0 if loss_mask is None else loss_mask
            mask_file.write(mask.tobytes())
        size, documents = self.sizes[split]
        written = self._files[split, "bin"].write(np.asarray(ids, dtype=np.int32).tobytes())
        self._files[split, LENGTHS].write(struct.pack("<i", len(ids)))
        self.sizes[split] = (size + written, documents + 1)

    def flush(self) -> None:
        """Writes everything to disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exception: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        for file in self._files.values():
            file.close()
        if exception is None:
            for split, (_, documents) in self.sizes.items():
                _write_index(self._folder / f"{split}.idx", documents)


def _open_to_append(path: Path, size: int) -> BinaryIO:
    """Truncates a file to ``size`` bytes and opens it to append.

    Raises:
        RecipeError: The file is shorter than ``size``.
    """
    path.touch()
    if path.stat().st_size < size:
        raise RecipeError(
            f"{path} is damaged: it is shorter than the {size:,} bytes that were written.",
            f"delete {path.parent} to prepare the text again",
        )
    os.truncate(path, size)
    return path.open("ab")


def _write_index(path: Path, documents: int) -> None:
    """Writes ``.idx`` as Megatron's ``_IndexWriter`` does, one block of lengths at a time."""
    lengths = path.with_suffix(f".{LENGTHS}")
    with _IndexWriter(str(path), np.int32) as writer:
        file = writer.idx_writer
        file.write(struct.pack("<QQ", documents, documents + 1))
        with lengths.open("rb") as source:
            shutil.copyfileobj(source, file)
        bytes_before = 0
        for start in range(0, documents, BLOCK):  # the first byte of each document in ``.bin``
            sizes = 4 * np.fromfile(lengths, np.int32, BLOCK, offset=4 * start).astype(np.int64)
            ends = bytes_before + np.cumsum(sizes)
            file.write((ends - sizes).tobytes())
            bytes_before = int(ends[-1])
        for start in range(0, documents + 1, BLOCK):  # document n is sequence n
            stop = min(start + BLOCK, documents + 1)
            file.write(np.arange(start, stop, dtype=np.int64).tobytes())
