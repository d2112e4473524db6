"""Sequences of tokens, read from Megatron's indexed datasets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from recipes.core.errors import RecipeError
from recipes.core.stage import Input
from recipes.data.results import DatasetResult, SourceTokens
from recipes.data.settings import PrepareDataConfig
from recipes.data.sources import source_names
from recipes.data.split_writer import LOSS_MASK


@dataclass(frozen=True)
class TextSequences:
    """Sequences of text on which models are compared."""

    tokens: Tensor
    """int64 [sequences, seq_length]."""
    prediction_mask: Tensor
    """bool [sequences, seq_length - 1]: which next-token predictions are in the loss."""
    sources: dict[str, slice] = field(default_factory=dict)
    """Range of sequences of each source; empty if the sources are not known."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: slice | list[int]) -> TextSequences:
        """Selects sequences. The result has no ``sources``."""
        return TextSequences(self.tokens[indices], self.prediction_mask[indices])

    def first(self, count: int) -> TextSequences:
        """Selects the first ``count / sources`` sequences of each source, rounded up."""
        spans = list(self.sources.values()) or [slice(0, len(self))]
        per_source = math.ceil(count / len(spans))
        ranges = (range(span.start, span.stop)[:per_source] for span in spans)
        return self[list(chain.from_iterable(ranges))]

    @property
    def predictions(self) -> int:
        """Number of predictions in the loss."""
        return int(self.prediction_mask.sum())

    @property
    def targets(self) -> Tensor:
        """Target tokens of the predictions in the loss, int64 [predictions]."""
        return self.tokens[:, 1:][self.prediction_mask]

    @classmethod
    def of(
        cls, tokens: Tensor, end: int | None = None, loss_mask: Tensor | None = None
    ) -> TextSequences:
        """Makes sequences from tokens. The arguments are those of ``prediction_mask``."""
        return cls(tokens, prediction_mask(tokens, end, loss_mask))


def prediction_mask(tokens: Tensor, end: int | None, loss_mask: Tensor | None = None) -> Tensor:
    """Returns which predictions are in the loss: all but those of the token after ``end``.

    The token after ``end`` starts another document and cannot be predicted (``eod_mask_loss`` in
    ``megatron/core/datasets/gpt_dataset.py``). In a conversation, only predictions of the
    assistant's tokens are in the loss.

    Args:
        tokens: int64 [..., n].
        end: Token after every document; ``None`` masks no prediction.
        loss_mask: bool [..., n], which tokens of conversations are targets. If it is set, ``end``
            has no effect.

    Returns:
        bool [..., n - 1]. Entry i is for the prediction of token i + 1.
    """
    if loss_mask is not None:
        return loss_mask[..., 1:]
    previous = tokens[..., :-1]  # the token before each predicted token
    return torch.ones_like(previous, dtype=torch.bool) if end is None else previous != end


def sequences_by_source(
    sources: Sequence[SourceTokens], seq_length: int, count: int | None = None
) -> dict[str, range]:
    """Returns the range of sequence indices of each source of a split.

    A split holds its sources one after the other, and sequence n starts at token n · seq_length.
    Sequences that span two sources, and sources without a whole sequence, are left out. With
    ``count``, only the first ``count / sources`` sequences of each source are returned, rounded up.
    """
    spans, start = {}, 0
    for entry in sources:
        stop = start + entry.tokens
        first = -(-start // seq_length)  # rounded up: the first sequence that starts in the source
        if span := range(first, stop // seq_length):
            spans[entry.source] = span
        start = stop
    if count is None or not spans:
        return spans
    per_source = math.ceil(count / len(spans))
    return {name: span[:per_source] for name, span in spans.items()}


def require_heldout_sources(cfg: PrepareDataConfig, tokens: Mapping[str, int]) -> None:
    """Checks that each held-out source has a whole sequence.

    Checks nothing if the stage has the input ``held_out``: then models are evaluated on its text.
    ``tokens`` has the number of tokens by source, in the order of the split ``heldout``. Only the
    held-out sources are needed, and these come first.

    Raises:
        RecipeError: A held-out source has no whole sequence.
    """
    heldout = [SourceTokens(*item) for item in tokens.items()]
    too_short = _without_sequence(heldout, _heldout_names(cfg), cfg.seq_length)
    if too_short and "held_out" not in cfg.inputs:
        raise RecipeError(
            f"no whole sequence of seq_length={cfg.seq_length} in heldout: {', '.join(too_short)}",
            f"give each of these sources more text, or {_seq_length_fix(cfg.seq_length)}",
        )


def _seq_length_fix(seq_length: int) -> str:
    """Returns a fix for sources without a whole sequence."""
    return (
        "lower data.seq_length. Sequences start at multiples of seq_length, so "
        f"{2 * seq_length - 1} tokens always suffice"
    )


def warn_of_short_sources(
    cfg: PrepareDataConfig, source_tokens: Mapping[str, Sequence[SourceTokens]]
) -> None:
    """Prints a warning for each split in which a source has no whole sequence."""
    for split, entries in source_tokens.items():
        # A source without text in the split, such as one that repeats another, has no entry.
        expected = _heldout_names(cfg) if split == "heldout" else cfg.training_names()
        names = [*(entry.source for entry in entries), *expected]
        if too_short := _without_sequence(entries, names, cfg.seq_length):
            effect = "cannot have a weight" if split == "train" else "nothing is measured on them"
            what = f"no whole sequence of seq_length={cfg.seq_length} in {split}"
            print(f"warning: {what}: {', '.join(too_short)}; {effect}", flush=True)


def _heldout_names(cfg: PrepareDataConfig) -> list[str]:
    """Returns the names of the held-out sources."""
    sources = source_names(cfg.all_sources()).items()
    return [name for name, source in sources if source in cfg.heldout_sources]


def _without_sequence(
    entries: Sequence[SourceTokens], names: Iterable[str], seq_length: int
) -> list[str]:
    """Returns those of the sources ``names`` that have no whole sequence."""
    by_source = sequences_by_source(entries, seq_length)
    return [name for name in dict.fromkeys(names) if name not in by_source]


def read_sequences(
    data: Input, split: str, seq_length: int, count: int | None = None
) -> TextSequences:
    """Reads the sequences of a split of ``prepare_data`` that ``sequences_by_source`` returns.

    Raises:
        RecipeError: No source has a whole sequence, or the text has conversations packed for
            another length.
    """
    require_seq_length(data, seq_length)
    text = data.manifest.result(DatasetResult)
    by_source = sequences_by_source(text.source_tokens[split], seq_length, count)
    # ``numbers`` are sequence indices in the split. ``spans`` are ranges of indices in ``numbers``.
    spans, numbers = {}, list[int]()
    for name, source_numbers in by_source.items():
        spans[name] = slice(len(numbers), len(numbers) + len(source_numbers))
        numbers += source_numbers
    if not numbers:
        raise RecipeError(
            f"no source of {data.directory} has a whole sequence of {seq_length} tokens in {split}",
            f"give one of the sources more text, or {_seq_length_fix(seq_length)}",
        )
    tokens = _select(read_tokens(data.artifact, split), seq_length, numbers).long()
    whole_mask = read_loss_mask(data.artifact, split)
    loss_mask = None if whole_mask is None else _select(whole_mask, seq_length, numbers)
    return replace(TextSequences.of(tokens, text.document_end, loss_mask), sources=spans)


def _select(values: np.ndarray, seq_length: int, numbers: list[int]) -> Tensor:
    """Returns the sequences ``numbers`` of a split's token ids or loss mask ``values`` [tokens].

    The shape is [sequences, seq_length].
    """
    sequences = values[: len(values) // seq_length * seq_length].reshape(-1, seq_length)
    return torch.from_numpy(sequences[numbers])


def require_seq_length(data: Input, seq_length: int) -> None:
    """Raises ``RecipeError`` if the text has conversations packed for another length."""
    packed = data.manifest.result(DatasetResult).seq_length
    if packed not in (None, seq_length):
        raise RecipeError(
            f"seq_length={seq_length}, but the conversations in {data.directory} are packed into "
            f"sequences of {packed}.",
            f"use seq_length={packed}, or prepare the text again",
        )


def first_sequences(
    artifact: Path, split: str, seq_length: int, count: int | None = None
) -> Tensor:
    """Returns the first ``count`` sequences of a split, int64 [sequences, seq_length].

    Returns fewer sequences if the split is shorter, and all if ``count`` is ``None``. A sequence
    may span several documents and sources.
    """
    ids = read_tokens(artifact, split)
    available = len(ids) // seq_length
    rows = available if count is None else min(available, count)
    return torch.from_numpy(ids[: rows * seq_length].astype(np.int64)).view(rows, seq_length)


def read_tokens(artifact: Path, split: str) -> np.ndarray:
    """Returns all tokens of a split as a memory-mapped array [tokens].

    The split is one range of ``.bin``, because documents have no gaps between them
    (``_IndexWriter._sequence_pointers``). Splits of text that was already tokenized are ranges of
    the same file (``token_files.py``).
    """
    path = str(artifact / split)
    index = IndexedDataset(path).index
    start = int(index.sequence_pointers[0]) if len(index) else 0
    tokens = int(index.sequence_lengths.sum(dtype=np.int64))
    return np.memmap(f"{path}.bin", dtype=index.dtype, mode="r", offset=start, shape=(tokens,))


def read_loss_mask(artifact: Path, split: str) -> np.ndarray | None:
    """Returns which tokens of a split are targets of the loss, bool [tokens].

    Returns ``None`` if the text has no conversations.
    """
    path = artifact / f"{split}.{LOSS_MASK}"
    return np.memmap(path, dtype=bool, mode="r") if path.exists() else None


def count_sequences(tokens: np.ndarray, seq_length: int) -> int:
    """Returns a split's number of training sequences. The last needs one more token as label."""
    return (len(tokens) - 1) // seq_length


def sequence_tokens(tokens: np.ndarray, seq_length: int, number: int) -> np.ndarray:
    """Returns the tokens of sequence ``number`` and the next token, int64 [seq_length + 1]."""
    start = number * seq_length
    ids: np.ndarray = tokens[start : start + seq_length + 1].astype(np.int64)
    return ids


def sequence_prediction_mask(
    tokens: np.ndarray, loss_mask: np.ndarray | None, seq_length: int, number: int, end: int | None
) -> Tensor:
    """Returns the ``prediction_mask`` of training sequence ``number``, bool [seq_length].

    ``tokens`` and ``loss_mask`` are those of the whole split.
    """
    ids = torch.from_numpy(sequence_tokens(tokens, seq_length, number))
    mask = None
    if loss_mask is not None:
        mask = torch.from_numpy(sequence_tokens(loss_mask, seq_length, number)).bool()
    return prediction_mask(ids, end, mask)


def sequence_order(numbers: np.ndarray, total: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the sequence indices ``numbers``, int64 [n], in the random order of an epoch.

    The order depends on ``seed``, ``epoch`` and ``total``, the number of sequences in the split.
    The relative order of two sequences does not depend on the others in ``numbers``. So training on
    cached logits of an epoch's first sequences has the same batches as without a cache.
    """
    sort_keys = np.random.default_rng([seed, epoch]).random(total)
    ordered: np.ndarray = numbers[np.argsort(sort_keys[numbers], kind="stable")]
    return ordered


def weighted_sequences(
    weights: Mapping[str, float], sources: Sequence[SourceTokens], seq_length: int, total: int
) -> list[np.ndarray]:
    """Returns the indices of the training sequences of each source of ``weights``, int64 [n].

    ``sources`` are all sources of the split, and ``total`` is its ``count_sequences``.

    Raises:
        RecipeError: A source has no whole sequence with a next token.
    """
    # If no token follows the split's last sequence, ``total`` excludes it.
    spans = {
        name: np.arange(span.start, min(span.stop, total))
        for name, span in sequences_by_source(sources, seq_length).items()
        if span.start < total
    }
    for name in weights:
        if name not in spans:
            raise RecipeError(
                f"source '{name}' has a weight, but not one sequence of {seq_length} tokens and "
                "a next token.",
                "remove the weight, or give the source more text that does not repeat earlier "
                f"sources; sources with a sequence: {', '.join(spans)}",
            )
    return [spans[name] for name in weights]


def blend(weights: Sequence[float], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Assigns samples to sources as Megatron's ``BlendedDataset`` does.

    A source's fraction is its weight divided by the sum of weights. Each sample is assigned to the
    source whose number of samples is furthest below its fraction of the samples so far. So among
    the first n samples, for any n, a source has less than 1 sample more than its fraction of n.

    Returns:
        The source of each sample, int16 [samples], as an index in ``weights``, and the sample's
        index within its source, int64 [samples].
    """
    sources, numbers = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    fractions = np.array(weights, dtype=np.float64) / math.fsum(weights)
    verbose = False
    # Fills ``sources`` and ``numbers`` in place.
    helpers.build_blending_indices(sources, numbers, fractions, len(fractions), samples, verbose)
    return sources, numbers
