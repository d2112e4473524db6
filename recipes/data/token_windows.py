"""Windows of tokens, read from Megatron's indexed datasets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from recipes.core.stage import Input
from recipes.data.results import DatasetResult, SourceTokens


def prefix(artifact: Path, part: str) -> Path:
    """Path of a part without ``.bin`` or ``.idx``, as Megatron wants it."""
    return artifact / part


@dataclass(frozen=True)
class TextWindows:
    """Windows of text, the same for all models that are compared on them."""

    tokens: Tensor
    """int64 [windows, sequence]."""
    counted: Tensor
    """bool [windows, sequence - 1]: which predictions of a next token count, see ``counts``."""
    sources: dict[str, slice] = field(default_factory=dict)
    """Which of the windows are of which source."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: slice | list[int]) -> TextWindows:
        """Some of the windows."""
        return TextWindows(self.tokens[chosen], self.counted[chosen])

    def first(self, count: int) -> TextWindows:
        """About so many windows, the first of each source."""
        whole = list(self.sources.values()) or [slice(0, len(self))]
        each = math.ceil(count / len(whole))
        return self[[n for span in whole for n in range(span.start, span.stop)[:each]]]

    @property
    def predictions(self) -> int:
        """How many predictions count."""
        return int(self.counted.sum())

    @property
    def targets(self) -> Tensor:
        """What is to be predicted where it counts, int64 [predictions]."""
        return self.tokens[:, 1:][self.counted]

    @classmethod
    def of(cls, tokens: Tensor, end: int | None = None) -> TextWindows:
        """Windows of tokens, with ``end`` after every document."""
        return cls(tokens, counts(tokens[:, :-1], end))


def counts(tokens: Tensor, end: int | None) -> Tensor:
    """Which of the predictions made from these tokens count: all but those from ``end``.

    What follows the end of a document is the beginning of another, which nothing foretells
    (``eod_mask_loss`` in ``megatron/core/datasets/gpt_dataset.py``). This is the mask of training,
    and of everything that compares models: evaluation, importance, ranking and halving.
    """
    return torch.ones_like(tokens, dtype=torch.bool) if end is None else tokens != end


def document_end(data: Input, part: str) -> int:
    """Token after every document; older text does not say, but ends with it."""
    end = data.manifest.result(DatasetResult).document_end
    return int(read_tokens(data.artifact, part)[-1]) if end is None else end


def spread(
    sources: Sequence[SourceTokens], seq_length: int, count: int | None = None
) -> dict[str, range]:
    """Numbers of the first windows of every source of a part, as many of each.

    A part holds its sources one after the other; no window, which begins at token n · seq_length,
    runs over from one to the next. A source that has no whole window is left out. ``count`` windows
    are rounded up to as many of each; all by default.
    """
    whole, start = {}, 0
    for entry in sources:
        stop = start + entry.tokens
        whole[entry.source] = range(-(-start // seq_length), stop // seq_length)
        start = stop
    usable = {name: numbers for name, numbers in whole.items() if numbers}
    if count is None or not usable:
        return usable
    each = math.ceil(count / len(usable))
    return {name: numbers[:each] for name, numbers in usable.items()}


def sources_of(data: Input, part: str) -> list[SourceTokens]:
    """A part's sources in their order; older text does not say, and is taken for one."""
    found = data.manifest.result(DatasetResult).source_tokens.get(part)
    return found or [SourceTokens("all", len(read_tokens(data.artifact, part)))]


def read_windows(data: Input, part: str, seq_length: int, count: int | None = None) -> TextWindows:
    """Windows of a part of ``prepare_data``'s output, the first of every source, as many of each.

    ``count`` is rounded up to as many of each source; all by default, fewer where one is shorter.
    """
    tokens = read_tokens(data.artifact, part)
    every = tokens[: len(tokens) // seq_length * seq_length].reshape(-1, seq_length)
    found, spans, start = [], {}, 0
    for name, numbers in spread(sources_of(data, part), seq_length, count).items():
        found.append(torch.from_numpy(every[numbers.start : numbers.stop].astype(np.int64)))
        spans[name] = slice(start, start := start + len(numbers))
    return replace(TextWindows.of(torch.cat(found), document_end(data, part)), sources=spans)


def windows(artifact: Path, part: str, seq_length: int, count: int | None = None) -> torch.Tensor:
    """Consecutive windows of a part as int64 [windows, seq_length], documents running on.

    All that fit by default; fewer than ``count`` if the part is shorter.
    """
    ids = read_tokens(artifact, part)
    fit = len(ids) // seq_length
    fit = fit if count is None else min(fit, count)
    return torch.from_numpy(ids[: fit * seq_length].astype(np.int64)).view(fit, seq_length)


def read_tokens(artifact: Path, part: str) -> np.ndarray:
    """All tokens of a part as one memory-mapped array [tokens].

    Megatron's ``IndexedDataset`` hands out a document at a time, by pointers that run through the
    ``.bin`` without gaps (``_IndexWriter._sequence_pointers``), so the file is one flat array.
    """
    path = prefix(artifact, part)
    return np.memmap(f"{path}.bin", dtype=IndexedDataset(str(path)).index.dtype, mode="r")


def count_windows(tokens: np.ndarray, seq_length: int) -> int:
    """Whole windows in a part, each with the label of its last token."""
    return (len(tokens) - 1) // seq_length


def window(tokens: np.ndarray, seq_length: int, number: int) -> np.ndarray:
    """Tokens of a window and the one after it, int64 [seq_length + 1]."""
    start = number * seq_length
    taken: np.ndarray = tokens[start : start + seq_length + 1].astype(np.int64)
    return taken


def window_order(ids: np.ndarray, total: int, seed: int, epoch: int) -> np.ndarray:
    """Permutes windows, int64 [n] of ``total``, for an epoch, counted from 0.

    A subset keeps the order that it has in the whole, so a cache of the first windows of an epoch
    gives the batches of a run without one.
    """
    ranks = np.random.default_rng([seed, epoch]).random(total)
    ordered: np.ndarray = ids[np.argsort(ranks[ids], kind="stable")]
    return ordered
