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

from recipes.core.errors import RecipeError
from recipes.core.stage import Input
from recipes.data.part_writer import LEARNT
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
    def of(
        cls, tokens: Tensor, end: int | None = None, learnt: Tensor | None = None
    ) -> TextWindows:
        """Windows of tokens, with ``end`` after every document."""
        return cls(tokens, counts(tokens, end, learnt))


def counts(tokens: Tensor, end: int | None, learnt: Tensor | None = None) -> Tensor:
    """Which of the predictions made within these tokens count: all but those from ``end``.

    What follows the end of a document is the beginning of another, which nothing foretells
    (``eod_mask_loss`` in ``megatron/core/datasets/gpt_dataset.py``). Of a conversation, only what
    the assistant says is to be predicted. This is the mask of training, and of everything that
    compares models: evaluation, importance, ranking and halving.

    Args:
        tokens: int64 [..., n].
        end: Token after every document, if there is one.
        learnt: bool [..., n], which tokens are to be predicted where that is told of each; see
            ``read_learnt``.

    Returns:
        bool [..., n - 1], by the token that a prediction is made from.
    """
    if learnt is not None:
        return learnt[..., 1:]
    before = tokens[..., :-1]
    return torch.ones_like(before, dtype=torch.bool) if end is None else before != end


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


def read_windows(data: Input, part: str, seq_length: int, count: int | None = None) -> TextWindows:
    """Windows of a part of ``prepare_data``'s output, the first of every source, as many of each.

    ``count`` is rounded up to as many of each source; all by default, fewer where one is shorter.
    """
    require_windows(data, seq_length)
    text = data.manifest.result(DatasetResult)
    spans, numbers = {}, list[int]()
    for name, of_source in spread(text.source_tokens[part], seq_length, count).items():
        spans[name] = slice(len(numbers), len(numbers) + len(of_source))
        numbers += of_source
    tokens, learnt = (
        None if every is None else torch.from_numpy(_chosen(every, seq_length, numbers))
        for every in (read_tokens(data.artifact, part), read_learnt(data.artifact, part))
    )
    assert tokens is not None
    return replace(TextWindows.of(tokens.long(), text.document_end, learnt), sources=spans)


def _chosen(every: np.ndarray, seq_length: int, numbers: list[int]) -> np.ndarray:
    """Some windows of a part's values, [windows, seq_length]."""
    whole = every[: len(every) // seq_length * seq_length].reshape(-1, seq_length)
    chosen: np.ndarray = whole[numbers]
    return chosen


def require_windows(data: Input, seq_length: int) -> None:
    """Refuses windows that conversations would run over the ends of.

    Raises:
        RecipeError: The text has conversations, which are whole in windows of another length.
    """
    made_for = data.manifest.result(DatasetResult).seq_length
    if made_for not in (None, seq_length):
        raise RecipeError(
            f"seq_length={seq_length}, but the conversations in {data.directory} are whole in "
            f"windows of {made_for}.",
            f"use seq_length={made_for}, or prepare the text again",
        )


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


def read_learnt(artifact: Path, part: str) -> np.ndarray | None:
    """Which tokens of a part are to be predicted, bool [tokens]; ``None`` if that is not told.

    It is told where there are conversations; of other documents it is then all but the first.
    """
    path = Path(f"{prefix(artifact, part)}.{LEARNT}")
    return np.memmap(path, dtype=bool, mode="r") if path.exists() else None


def count_windows(tokens: np.ndarray, seq_length: int) -> int:
    """Whole windows in a part, each with the label of its last token."""
    return (len(tokens) - 1) // seq_length


def window(tokens: np.ndarray, seq_length: int, number: int) -> np.ndarray:
    """Tokens of a window and the one after it, int64 [seq_length + 1]."""
    start = number * seq_length
    taken: np.ndarray = tokens[start : start + seq_length + 1].astype(np.int64)
    return taken


def counted(
    tokens: np.ndarray, learnt: np.ndarray | None, seq_length: int, number: int, end: int | None
) -> Tensor:
    """Which predictions of a window count, see ``counts``: bool [seq_length]."""
    marks = None if learnt is None else torch.from_numpy(window(learnt, seq_length, number)).bool()
    return counts(torch.from_numpy(window(tokens, seq_length, number)), end, marks)


def window_order(ids: np.ndarray, total: int, seed: int, epoch: int) -> np.ndarray:
    """Permutes windows, int64 [n] of ``total``, for an epoch, counted from 0.

    A subset keeps the order that it has in the whole, so a cache of the first windows of an epoch
    gives the batches of a run without one.
    """
    ranks = np.random.default_rng([seed, epoch]).random(total)
    ordered: np.ndarray = ids[np.argsort(ranks[ids], kind="stable")]
    return ordered
