"""Divides text that is already tokenized into training, validation and other splits.

The text is a pair of Megatron's files: tokens in ``.bin``, and an index in ``.idx``. Each split is
a range of documents, as with Megatron's setting ``split``, and gets its own index. The ``.bin`` of
a split is a link to the whole ``.bin``, so no token is copied. Only the functions that need NumPy
import it, because planning calls the other functions on login nodes, which do not have NumPy.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.core.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
"""First bytes of every index."""
_HEADER = struct.Struct("<9sQBQQ")
"""Header of an index: ``MAGIC``, version, code of the tokens' data type, and the numbers of
sequences and of document boundaries. The arrays ``lengths``, ``pointers`` and ``documents`` of
``TokenFiles`` follow it."""
DTYPES = {4: "i", 5: "q", 8: "H"}
"""Supported data types of tokens (int32, int64 and uint16): Megatron's code, and the name that
``array``, ``struct`` and NumPy all use."""
BLOCK = 1 << 24
"""Tokens that ``require_valid`` checks at once: 32 to 128 MiB of memory."""
SAMPLED_TOKENS = 200
"""Tokens from the start of the text that are decoded to show that the tokenizer fits."""
FIRST_TOKENS = 1 << 16
"""Tokens from the start of the text that planning compares with the vocabulary."""
CHECKED_ENDS = 1000
"""Documents from the start of the text whose last token ``require_document_end`` checks."""


@dataclass(frozen=True)
class TokenFiles:
    """A pair of files, memory-mapped. A document consists of sequences, usually of one."""

    prefix: Path
    """Path of both files without the suffix."""
    dtype_code: int
    """Key in ``DTYPES``."""
    lengths: np.ndarray
    """Tokens of each sequence, int32 [sequences]."""
    pointers: np.ndarray
    """Position of each sequence's first byte in ``.bin``, int64 [sequences]."""
    documents: np.ndarray
    """Index of each document's first sequence; last, the number of sequences. int64
    [documents + 1]."""
    tokens: np.ndarray
    """All tokens [tokens]."""

    def start(self, document: int) -> int:
        """Returns the index in ``tokens`` of a document's first token.

        If ``document`` is the number of documents, returns the number of tokens.
        """
        sequence = int(self.documents[document])
        if sequence == len(self.pointers):
            return len(self.tokens)
        return int(self.pointers[sequence]) // self.tokens.itemsize


def paths_of(prefix: Path) -> dict[str, Path]:
    """Returns the paths of both files of a prefix, by suffix."""
    return {suffix: prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin")}


def require_token_files(prefix: Path) -> tuple[int, int, int, int]:
    """Compares the header and the last sequence of an index with the sizes of both files.

    Returns:
        Code of the data type, and numbers of sequences, document boundaries and tokens.

    Raises:
        RecipeError: A file is missing or damaged, or the index was written for another ``.bin``.
    """
    index, data = paths_of(prefix).values()
    for path in (index, data):
        if not path.is_file() or not path.stat().st_size:
            raise _problem(f"{path} is missing or empty", "give the path without .bin and .idx")
    with index.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            raise _problem(f"{index} is not an index of Megatron")
        _, version, code, sequences, boundaries = _HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise _problem(
                f"{index} has version {version} and data type {code}; supported are version 1 and "
                f"data types {', '.join(map(str, DTYPES))}"
            )
        # A sequence has an int32 length and an int64 pointer: 12 bytes. A boundary is int64.
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if index.stat().st_size != expected or not sequences or boundaries < 2:
            raise _problem(
                f"{index} has {index.stat().st_size:,} bytes, but {sequences:,} sequences in "
                f"{boundaries - 1:,} documents take {expected:,}"
            )
        # Reads the last entries of ``lengths`` (4 bytes each) and of ``pointers`` (8 bytes each).
        file.seek(_HEADER.size + 4 * (sequences - 1))
        [last_length] = struct.unpack("<i", file.read(4))
        file.seek(_HEADER.size + 12 * sequences - 8)
        [last_pointer] = struct.unpack("<q", file.read(8))
    itemsize = struct.calcsize(DTYPES[code])
    data_bytes = last_pointer + last_length * itemsize
    if data.stat().st_size != data_bytes:
        raise _problem(
            f"{data} has {data.stat().st_size:,} bytes, but its index says {data_bytes:,}"
        )
    return code, sequences, boundaries, data_bytes // itemsize


def open_token_files(prefix: Path) -> TokenFiles:
    """Checks a pair of files with ``require_token_files``, and memory-maps them."""
    import numpy as np

    code, sequences, boundaries, _ = require_token_files(prefix)
    index, data = paths_of(prefix).values()
    offset = _HEADER.size
    lengths: np.ndarray = np.memmap(index, np.int32, "r", offset, (sequences,))
    offset += 4 * sequences
    pointers: np.ndarray = np.memmap(index, np.int64, "r", offset, (sequences,))
    offset += 8 * sequences
    documents: np.ndarray = np.memmap(index, np.int64, "r", offset, (boundaries,))
    tokens: np.ndarray = np.memmap(data, DTYPES[code], "r")
    return TokenFiles(prefix, code, lengths, pointers, documents, tokens)


def _problem(
    what: str, fix: str = "copy both files again, or tokenize the text again"
) -> RecipeError:
    """Returns an error about the files of ``data.prefix``."""
    return RecipeError(f"data.prefix: {what}.", fix)


def require_valid(files: TokenFiles, vocabulary: int, progress: Callable[[int, int], None]) -> None:
    """Checks the whole index and all tokens.

    ``vocabulary`` is the tokenizer's largest id plus 1. ``progress`` is called with the number of
    checked tokens and the number of all tokens.

    Raises:
        RecipeError: The index is inconsistent, or a token is not in the vocabulary.
    """
    import numpy as np

    # The byte after each sequence, where the next sequence must start.
    ends = np.cumsum(files.lengths, dtype=np.int64) * files.tokens.itemsize
    is_consistent = (
        int(files.lengths.min()) >= 0
        and int(files.pointers[0]) == 0
        and np.array_equal(files.pointers[1:], ends[:-1])
        and int(files.documents[0]) == 0
        and int(files.documents[-1]) == len(files.lengths)
        and bool(np.all(np.diff(files.documents) >= 0))
    )
    if not is_consistent:
        raise _damaged_index(files.prefix)
    for start in range(0, len(files.tokens), BLOCK):
        block = files.tokens[start : start + BLOCK]
        _require_range(files.prefix, int(block.min()), int(block.max()), vocabulary)
        progress(min(start + BLOCK, len(files.tokens)), len(files.tokens))


def require_first_tokens(prefix: Path, vocabulary: int) -> None:
    """Checks that the first ``FIRST_TOKENS`` tokens are less than ``vocabulary``.

    Raises:
        RecipeError: A token is not in the vocabulary, or ``require_token_files`` raises an error.
    """
    code, _, _, total = require_token_files(prefix)
    tokens = array(DTYPES[code])
    with paths_of(prefix)[".bin"].open("rb") as file:
        tokens.fromfile(file, min(total, FIRST_TOKENS))
    _require_range(prefix, min(tokens), max(tokens), vocabulary)


def _require_range(prefix: Path, lowest: int, largest: int, vocabulary: int) -> None:
    if lowest < 0 or largest >= vocabulary:
        invalid_token = lowest if lowest < 0 else largest
        raise _problem(
            f"{prefix}.bin has token {invalid_token}, "
            f"but the model's tokenizer has {vocabulary:,} ids",
            "tokenize the text with this model's tokenizer, or set data.sources instead",
        )


def _damaged_index(prefix: Path) -> RecipeError:
    return _problem(f"{prefix}.idx is damaged: its arrays do not fit together")


def require_document_end(prefix: Path, end: int, name_of: Callable[[int], str]) -> bool:
    """Returns whether the first ``CHECKED_ENDS`` documents all end with the token ``end``.

    ``name_of`` returns the text of a token, for the error message.

    Raises:
        RecipeError: At least two documents have tokens, and all checked documents end with the same
            token, which is not ``end``. Or the files are damaged.
    """
    last_tokens = _last_tokens(prefix)
    all_are_equal = len(last_tokens) > 1 and len(set(last_tokens)) == 1
    if all_are_equal and last_tokens[0] != end:
        last = last_tokens[0]
        raise _problem(
            f"documents end with token {last} ({name_of(last)}), not with {end} ({name_of(end)})",
            f"data.document_end='{name_of(last)}'",
        )
    return set(last_tokens) == {end}


def _last_tokens(prefix: Path) -> list[int]:
    """Returns the last tokens of the first ``CHECKED_ENDS`` documents, but not of empty ones."""
    code, sequences, boundaries, total = require_token_files(prefix)
    index, data = paths_of(prefix).values()
    itemsize = struct.calcsize(DTYPES[code])
    last_tokens: dict[int, int] = {}  # by the byte at which the document stops
    with index.open("rb") as index_file, data.open("rb") as data_file:

        def read_pointers(position: int, count: int) -> array[int]:
            """Returns ``count`` int64 numbers from ``position`` bytes after ``lengths``."""
            index_file.seek(_HEADER.size + 4 * sequences + position)
            numbers = array("q")
            numbers.fromfile(index_file, count)
            return numbers

        # ``documents`` follows ``pointers``. Its entries from 1 are the sequences before which the
        # documents stop. An empty document stops at the same byte as the previous document.
        checked = min(CHECKED_ENDS, boundaries - 1)
        for sequence in read_pointers(8 * (sequences + 1), checked):
            if not 0 <= sequence <= sequences:
                raise _damaged_index(prefix)
            at_file_end = sequence == sequences
            stop = total * itemsize if at_file_end else read_pointers(8 * sequence, 1)[0]
            if not 0 <= stop <= total * itemsize:
                raise _damaged_index(prefix)
            if stop:
                data_file.seek(stop - itemsize)
                [last_tokens[stop]] = struct.unpack(f"={DTYPES[code]}", data_file.read(itemsize))
    return list(last_tokens.values())


def split_ranges(
    files: TokenFiles,
    fractions: Mapping[str, float],
    max_documents: int | None,
    max_tokens: int | None,
) -> dict[str, range]:
    """Returns a range of documents for each split: ``train`` first, then ``fractions`` in order.

    ``fractions`` has the fraction of the tokens of each split but ``train``, which gets the
    remainder. The splits have the first ``max_documents`` documents, or the first ``max_tokens``
    tokens if these are fewer, rounded up to whole documents. ``None`` means no limit.
    """
    all_documents = len(files.documents) - 1
    limit = min(all_documents, max_documents or all_documents)
    if max_tokens is not None:
        limit = min(limit, max(1, _document_at(files, max_tokens)))  # at least one document
    tokens = files.start(limit)
    # Fraction of the tokens that precede the end of the current split.
    end_fraction = 1 - sum(fractions.values())
    ranges = {"train": range(min(limit, _document_at(files, tokens * end_fraction)))}
    for split, fraction in fractions.items():
        end_fraction += fraction
        is_last = end_fraction > 1 - 1e-9  # sums of fractions have rounding errors
        stop = limit if is_last else min(limit, _document_at(files, tokens * end_fraction))
        first = max(documents.stop for documents in ranges.values())
        ranges[split] = range(first, max(first, stop))
    return ranges


def _document_at(files: TokenFiles, position: float) -> int:
    """Returns the number of the first document that starts at token ``position`` or later."""
    import numpy as np

    sequence = np.searchsorted(files.pointers, position * files.tokens.itemsize)
    return int(np.searchsorted(files.documents, sequence))


def write_split(files: TokenFiles, documents: range, target: Path) -> int:
    """Writes the files of a split: the index of a range of documents, and a link to ``.bin``.

    ``target`` is the path of the split's files without the suffix. Returns the number of tokens.
    """
    # The split's sequences. Their pointers do not change, because ``.bin`` is the whole file.
    first, stop = (int(files.documents[n]) for n in (documents.start, documents.stop))
    boundaries = files.documents[documents.start : documents.stop + 1] - first
    index, data = paths_of(target).values()
    with index.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, 1, files.dtype_code, stop - first, len(boundaries)))
        for numbers in (files.lengths[first:stop], files.pointers[first:stop], boundaries):
            numbers.tofile(file)
    data.symlink_to(paths_of(files.prefix)[".bin"].resolve())
    return files.start(documents.stop) - files.start(documents.start)
