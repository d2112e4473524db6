"""Sequences of tokens, read from Megatron's indexed datasets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from recipes.core.errors import RecipeError
from recipes.core.stage import Input
from recipes.data.part_writer import LOSS_MASK
from recipes.data.results import DatasetResult, SourceTokens


@dataclass(frozen=True)
class TextSequences:
    """Sequences of text on which models are compared."""

    tokens: Tensor
    """int64 [sequences, seq_length]."""
    counted: Tensor
    """bool [sequences, seq_length - 1]: which next-token predictions count, see ``counts``."""
    sources: dict[str, slice] = field(default_factory=dict)
    """The sequences of each source."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: slice | list[int]) -> TextSequences:
        """Selects sequences."""
        return TextSequences(self.tokens[chosen], self.counted[chosen])

    def first(self, count: int) -> TextSequences:
        """Selects about ``count`` sequences, the first of each source."""
        spans = list(self.sources.values()) or [slice(0, len(self))]
        each = math.ceil(count / len(spans))
        return self[[n for span in spans for n in range(span.start, span.stop)[:each]]]

    @property
    def predictions(self) -> int:
        """Number of predictions that count."""
        return int(self.counted.sum())

    @property
    def targets(self) -> Tensor:
        """Target tokens of the predictions that count, int64 [predictions]."""
        return self.tokens[:, 1:][self.counted]

    @classmethod
    def of(
        cls, tokens: Tensor, end: int | None = None, loss_mask: Tensor | None = None
    ) -> TextSequences:
        """Makes sequences of tokens that have ``end`` after every document."""
        return cls(tokens, counts(tokens, end, loss_mask))


def counts(tokens: Tensor, end: int | None, loss_mask: Tensor | None = None) -> Tensor:
    """Returns which next-token predictions count: all but those from ``end``.

    The token after a document's end begins another document and cannot be predicted
    (``eod_mask_loss`` in ``megatron/core/datasets/gpt_dataset.py``). Of a conversation, only the
    assistant's tokens count. Training, evaluation, scores and the search share this mask.

    Args:
        tokens: int64 [..., n].
        end: Token after every document, if there is one.
        loss_mask: bool [..., n], which tokens count as targets; see ``read_loss_mask``.

    Returns:
        bool [..., n - 1], by the token that a prediction is made from.
    """
    if loss_mask is not None:
        return loss_mask[..., 1:]
    before = tokens[..., :-1]
    return torch.ones_like(before, dtype=torch.bool) if end is None else before != end


def spread(
    sources: Sequence[SourceTokens], seq_length: int, count: int | None = None
) -> dict[str, range]:
    """Returns which sequences of a split to take from each source.

    A split holds its sources one after the other, and sequence n starts at token n · seq_length.
    Sequences across two sources, and sources without a whole sequence, are left out. With
    ``count``, each source gives its first ones: an equal number, rounded up, or all that it has.
    """
    spans, start = {}, 0
    for entry in sources:
        stop = start + entry.tokens
        if numbers := range(-(-start // seq_length), stop // seq_length):
            spans[entry.source] = numbers
        start = stop
    each = None if count is None or not spans else math.ceil(count / len(spans))
    return {name: numbers[:each] for name, numbers in spans.items()}


def read_sequences(
    data: Input, part: str, seq_length: int, count: int | None = None
) -> TextSequences:
    """Reads sequences of a part of ``prepare_data``'s output, chosen as by ``spread``."""
    require_seq_length(data, seq_length)
    text = data.manifest.result(DatasetResult)
    spans, numbers = {}, list[int]()
    for name, of_source in spread(text.source_tokens[part], seq_length, count).items():
        spans[name] = slice(len(numbers), len(numbers) + len(of_source))
        numbers += of_source
    tokens = _select(read_tokens(data.artifact, part), seq_length, numbers).long()
    whole_mask = read_loss_mask(data.artifact, part)
    loss_mask = None if whole_mask is None else _select(whole_mask, seq_length, numbers)
    return replace(TextSequences.of(tokens, text.document_end, loss_mask), sources=spans)


def _select(values: np.ndarray, seq_length: int, numbers: list[int]) -> Tensor:
    """Returns sequences of a part's values, [sequences, seq_length]."""
    sequences = values[: len(values) // seq_length * seq_length].reshape(-1, seq_length)
    return torch.from_numpy(sequences[numbers])


def require_seq_length(data: Input, seq_length: int) -> None:
    """Raises ``RecipeError`` if the text has conversations packed for another length."""
    packed = data.manifest.result(DatasetResult).seq_length
    if packed not in (None, seq_length):
        raise RecipeError(
            f"seq_length={seq_length}, but the conversations in {data.directory} are whole in "
            f"sequences of {packed}.",
            f"use seq_length={packed}, or prepare the text again",
        )


def first_sequences(artifact: Path, part: str, seq_length: int, count: int | None = None) -> Tensor:
    """Returns a split's first sequences, int64 [sequences, seq_length]. They may span documents."""
    ids = read_tokens(artifact, part)
    fit = min(len(ids) // seq_length, len(ids) if count is None else count)
    return torch.from_numpy(ids[: fit * seq_length].astype(np.int64)).view(fit, seq_length)


def read_tokens(artifact: Path, part: str) -> np.ndarray:
    """Returns all tokens of a split as a memory-mapped array [tokens].

    Megatron's ``.bin`` holds documents without gaps (``_IndexWriter._sequence_pointers``). Splits
    of text that was already tokenized share one file (``token_files.py``).
    """
    path = str(artifact / part)
    index = IndexedDataset(path).index
    start = int(index.sequence_pointers[0]) if len(index) else 0
    tokens = int(index.sequence_lengths.sum(dtype=np.int64))
    return np.memmap(f"{path}.bin", dtype=index.dtype, mode="r", offset=start, shape=(tokens,))


def read_loss_mask(artifact: Path, part: str) -> np.ndarray | None:
    """Returns which tokens of a part count as targets, bool [tokens]; ``None`` without chats."""
    path = artifact / f"{part}.{LOSS_MASK}"
    return np.memmap(path, dtype=bool, mode="r") if path.exists() else None


def count_sequences(tokens: np.ndarray, seq_length: int) -> int:
    """Returns how many sequences of a split have a next token after their last one, its label."""
    return (len(tokens) - 1) // seq_length


def sequence_tokens(tokens: np.ndarray, seq_length: int, number: int) -> np.ndarray:
    """Returns the tokens of a sequence and the one after it, int64 [seq_length + 1]."""
    start = number * seq_length
    ids: np.ndarray = tokens[start : start + seq_length + 1].astype(np.int64)
    return ids


def counted(
    tokens: np.ndarray, loss_mask: np.ndarray | None, seq_length: int, number: int, end: int | None
) -> Tensor:
    """Returns which predictions of a sequence count, see ``counts``: bool [seq_length]."""
    ids, mask = (
        None if values is None else torch.from_numpy(sequence_tokens(values, seq_length, number))
        for values in (tokens, loss_mask)
    )
    return counts(ids, end, None if mask is None else mask.bool())


def sequence_order(ids: np.ndarray, total: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the sequences ``ids``, int64 [n], in the random order of an epoch.

    A subset keeps its order among all sequences, so a cache of an epoch's first sequences gives the
    same batches as no cache.
    """
    ranks = np.random.default_rng([seed, epoch]).random(total)
    ordered: np.ndarray = ids[np.argsort(ranks[ids], kind="stable")]
    return ordered


def weighted_sequences(
    weights: Mapping[str, float], sources: Sequence[SourceTokens], seq_length: int, total: int
) -> list[np.ndarray]:
    """Returns the numbers of each weighted source's sequences, int64 [n], in the weights' order.

    Args:
        weights: Weights by source.
        sources: All sources of the part, as in ``spread``.
        seq_length: Tokens of a sequence.
        total: Number of sequences in the part, see ``count_sequences``.

    Raises:
        RecipeError: A source has no whole sequence with a next token.
    """
    spans = {
        name: np.arange(numbers.start, min(numbers.stop, total))
        for name, numbers in spread(sources, seq_length).items()
        if numbers.start < total
    }
    for name in weights:
        if name not in spans:
            raise RecipeError(
                f"source '{name}' has a weight, but not one sequence of {seq_length} tokens and "
                "a next token.",
                f"remove it, or give it more text; sources with text: {', '.join(spans)}",
            )
    return [spans[name] for name in weights]


def blend(weights: Sequence[float], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Assigns samples to sources as Megatron's ``BlendedDataset``: to the one furthest behind.

    Returns:
        The source of each sample, int16 [samples], and the sample's number within its source, int64
        [samples]. No source ever has a whole sample more than its fraction.
    """
    sources, numbers = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    fractions = np.array(weights, dtype=np.float64) / math.fsum(weights)
    helpers.build_blending_indices(sources, numbers, fractions, len(fractions), samples, False)
    return sources, numbers
