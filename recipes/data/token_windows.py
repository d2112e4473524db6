"""Windows of tokens, read from Megatron's indexed datasets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from recipes.core.stage import Input
from recipes.data.results import DatasetResult


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

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: slice) -> TextWindows:
        """Some of the windows."""
        return TextWindows(self.tokens[chosen], self.counted[chosen])

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


def read_windows(data: Input, part: str, seq_length: int, count: int | None = None) -> TextWindows:
    """The first windows of a part.

    Args:
        data: Output of ``prepare_data``.
        part: One of ``corpus.PARTS``.
        seq_length: Tokens a window.
        count: Windows wanted; all that fit by default. Fewer are returned if the part is shorter.
    """
    tokens = windows(data.artifact, part, seq_length, count)
    return TextWindows.of(tokens, document_end(data, part))


def windows(
    artifact: Path,
    part: str,
    seq_length: int,
    count: int | None = None,
    span: slice = slice(None),
) -> torch.Tensor:
    """Consecutive windows of a part as int64 [windows, seq_length], documents running on.

    Args:
        artifact: Artifact directory of ``prepare_data``.
        part: One of ``corpus.PARTS``.
        seq_length: Tokens a window.
        count: Windows wanted; all that fit by default. Fewer are returned if the part is shorter.
        span: Tokens of the part to take them from; all by default.
    """
    ids = read_tokens(artifact, part)[span]
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
    """Permutes windows for an epoch; a subset keeps the order that it has in the whole.

    So a cache of the first windows of an epoch gives the batches of a run without one.

    Args:
        ids: Numbers of the windows to order, int64 [n].
        total: Windows in the part.
        seed: Seed of all epochs.
        epoch: Number of the epoch, from 0.
    """
    ranks = np.random.default_rng([seed, epoch]).random(total)
    ordered: np.ndarray = ids[np.argsort(ranks[ids], kind="stable")]
    return ordered
