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
"""Bytes of a split's tokens, and number of its documents."""
LOSS_MASK = "loss_mask"
"""Suffix of a file with one byte per token: 1 if the token is a target of the loss."""
LENGTHS = "lengths"
"""Suffix of a file with the token count of each document (int32), from which ``.idx`` is made."""
BLOCK = 1 << 16
"""Documents per block while an index is written."""


class SplitWriter:
    """Writes several splits, one document at a time, in constant memory.

    To be used in a ``with`` statement, which writes the ``.idx`` files at its end unless there is
    an exception. Megatron's ``IndexedDatasetBuilder`` makes the same files. But it keeps all
    lengths in memory, and cannot append to files.

    To continue existing files in ``folder``, ``sizes`` has the size to which each split's files are
    truncated. A split without a size starts empty. If ``masked``, also writes ``LOSS_MASK`` files.
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
        self.sizes: dict[str, SplitSize] = {}
        """Size of each split."""
        for split in splits:
            size, documents = (sizes or {}).get(split, (0, 0))
            self.sizes[split] = (size, documents)  # a size that was read from JSON is a list
        self._files: dict[tuple[str, str], BinaryIO] = {}
        """Open files by split and suffix."""
        for split, (size, documents) in self.sizes.items():
            # A length has 4 bytes, an entry of the mask 1 byte per token.
            byte_counts = {"bin": size, LENGTHS: 4 * documents, LOSS_MASK: size // TOKEN_BYTES}
            for suffix, count in byte_counts.items():
                if masked or suffix != LOSS_MASK:
                    path = folder / f"{split}.{suffix}"
                    self._files[split, suffix] = _open_to_append(path, count)

    def add(
        self, split: str, ids: Sequence[int] | np.ndarray, loss_mask: np.ndarray | None = None
    ) -> None:
        """Appends one document with the token ids [n].

        ``loss_mask``, bool [n], says which tokens are in the loss; by default all but the first.
        """
        if mask_file := self._files.get((split, LOSS_MASK)):
            mask = np.arange(len(ids)) > 0 if loss_mask is None else loss_mask
            mask_file.write(mask.tobytes())
        written = self._files[split, "bin"].write(np.asarray(ids, dtype=np.int32).tobytes())
        self._files[split, LENGTHS].write(struct.pack("<i", len(ids)))
        size, documents = self.sizes[split]
        self.sizes[split] = (size + written, documents + 1)

    def flush(self) -> None:
        """Writes buffered data to disk."""
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
    """Truncates a file to ``size`` bytes and opens it to append. Creates a missing file.

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
    """Writes ``.idx`` as Megatron's ``_IndexWriter`` does, one block of lengths at a time.

    In Megatron's format, a document may have several sequences. Here, it has one.
    """
    lengths_path = path.with_suffix(f".{LENGTHS}")
    with _IndexWriter(str(path), np.int32) as writer:  # writes the header
        index = writer.idx_writer
        # Writes the numbers of sequences and of document boundaries, then each sequence's length.
        index.write(struct.pack("<QQ", documents, documents + 1))
        with lengths_path.open("rb") as lengths:
            shutil.copyfileobj(lengths, index)
        # Writes the position of each sequence's first byte in ``.bin``.
        bytes_before = 0
        for start in range(0, documents, BLOCK):
            block = np.fromfile(lengths_path, np.int32, BLOCK, offset=4 * start)  # 4-byte lengths
            sizes = TOKEN_BYTES * block.astype(np.int64)  # bytes of each sequence
            ends = bytes_before + np.cumsum(sizes)
            index.write((ends - sizes).tobytes())
            bytes_before = int(ends[-1])
        # Writes the boundaries of documents: the number of sequences before each, from 0.
        for start in range(0, documents + 1, BLOCK):
            stop = min(start + BLOCK, documents + 1)
            index.write(np.arange(start, stop, dtype=np.int64).tobytes())
