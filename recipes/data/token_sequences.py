"""Sequences of tokens, read from Megatron's indexed datasets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    """Range of sequences of each source."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: slice | list[int]) -> TextSequences:
        """Selects sequences. The result has no ``sources``."""
        return TextSequences(self.tokens[chosen], self.prediction_mask[chosen])

    def first(self, count: int) -> TextSequences:
        """Selects about ``count`` sequences, the first of each source."""
        spans = list(self.sources.values()) or [slice(0, len(self))]
        per_source = math.ceil(count / len(spans))
        return self[[n for span in spans for n in range(span.start, span.stop)[:per_source]]]

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
        """Makes sequences from tokens with ``end`` after every document."""
        return cls(tokens, prediction_mask(tokens, end, loss_mask))


def prediction_mask(tokens: Tensor, end: int | None, loss_mask: Tensor | None = None) -> Tensor:
    """Returns which predictions are in the loss: all but those of the token after ``end``.

    The token after ``end`` starts another document and cannot be predicted (``eod_mask_loss`` in
    ``megatron/core/datasets/gpt_dataset.py``). In a conversation, only predictions of the
    assistant's tokens are in the loss. Training, evaluation, scores and the search use this mask.

    Args:
        tokens: int64 [..., n].
        end: Token after every document, if there is one.
        loss_mask: bool [..., n], which tokens are targets; see ``read_loss_mask``.

    Returns:
        bool [..., n - 1]. Entry i is for the prediction of token i + 1.
    """
    if loss_mask is not None:
        return loss_mask[..., 1:]
    before = tokens[..., :-1]
    return torch.ones_like(before, dtype=torch.bool) if end is None else before != end


def sequences_by_source(
    sources: Sequence[SourceTokens], seq_length: int, count: int | None = None
) -> dict[str, range]:
    """Returns which sequences of a split to take from each source.

    A split holds its sources one after the other, and sequence n starts at token n · seq_length.
    Sequences that span two sources, and sources without a whole sequence, are left out. With
    ``count``, each source gives its first ``count / sources`` sequences, rounded up.
    """
    spans, start = {}, 0
    for entry in sources:
        stop = start + entry.tokens
        if span := range(-(-start // seq_length), stop // seq_length):
            spans[entry.source] = span
        start = stop
    per_source = None if count is None or not spans else math.ceil(count / len(spans))
    return {name: span[:per_source] for name, span in spans.items()}


def require_heldout_sources(cfg: PrepareDataConfig, tokens: Mapping[str, int]) -> None:
    """Checks that each held-out source has a whole sequence.

    With the input ``held_out``, models are evaluated on the held-out text of the other stage.

    Args:
        cfg: Settings of the text.
        tokens: Number of tokens by source, in the order of the held-out split. It starts with the
            held-out sources, so the result does not depend on later sources.

    Raises:
        RecipeError: A held-out source has no whole sequence.
    """
    heldout = [SourceTokens(*item) for item in tokens.items()]
    missing = _without_sequence(heldout, _heldout_names(cfg), cfg.seq_length)
    if missing and "held_out" not in cfg.inputs:
        raise RecipeError(
            f"no whole sequence of seq_length={cfg.seq_length} in heldout: {', '.join(missing)}",
            "give each of these sources more text, or set data.seq_length lower. Sequences start "
            f"at multiples of seq_length, so {2 * cfg.seq_length - 1} tokens always suffice",
        )


def warn_of_short_sources(
    cfg: PrepareDataConfig, source_tokens: Mapping[str, Sequence[SourceTokens]]
) -> None:
    """Prints a warning for each split that has no whole sequence of a source.

    Args:
        cfg: Settings of the text.
        source_tokens: ``DatasetResult.source_tokens``.
    """
    for split, entries in source_tokens.items():
        names = [entry.source for entry in entries]
        names += _heldout_names(cfg) if split == "heldout" else []
        if missing := _without_sequence(entries, names, cfg.seq_length):
            effect = "cannot have a weight" if split == "train" else "nothing is measured on them"
            what = f"no whole sequence of seq_length={cfg.seq_length} in {split}"
            print(f"warning: {what}: {', '.join(missing)}; {effect}", flush=True)


def _heldout_names(cfg: PrepareDataConfig) -> list[str]:
    trained = cfg.training_names()
    return [name for name in source_names(cfg.all_sources()) if name not in trained]


def _without_sequence(
    entries: Sequence[SourceTokens], names: Iterable[str], seq_length: int
) -> list[str]:
    """Returns those of the sources ``names`` that have no whole sequence."""
    present = sequences_by_source(entries, seq_length)
    return [name for name in dict.fromkeys(names) if name not in present]


def read_sequences(
    data: Input, split: str, seq_length: int, count: int | None = None
) -> TextSequences:
    """Reads the sequences of a split that ``sequences_by_source`` chooses."""
    require_seq_length(data, seq_length)
    text = data.manifest.result(DatasetResult)
    spans, numbers = {}, list[int]()
    for name, of_source in sequences_by_source(
        text.source_tokens[split], seq_length, count
    ).items():
        spans[name] = slice(len(numbers), len(numbers) + len(of_source))
        numbers += of_source
    tokens = _select(read_tokens(data.artifact, split), seq_length, numbers).long()
    whole_mask = read_loss_mask(data.artifact, split)
    loss_mask = None if whole_mask is None else _select(whole_mask, seq_length, numbers)
    return replace(TextSequences.of(tokens, text.document_end, loss_mask), sources=spans)


def _select(values: np.ndarray, seq_length: int, numbers: list[int]) -> Tensor:
    """Returns sequences by index, [sequences, seq_length]. ``values`` has one entry per token."""
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
    """Returns a split's first sequences, int64 [sequences, seq_length]. They may span documents."""
    ids = read_tokens(artifact, split)
    available = len(ids) // seq_length
    number = available if count is None else min(available, count)
    return torch.from_numpy(ids[: number * seq_length].astype(np.int64)).view(number, seq_length)


def read_tokens(artifact: Path, split: str) -> np.ndarray:
    """Returns all tokens of a split as a memory-mapped array [tokens].

    Megatron's ``.bin`` holds documents without gaps (``_IndexWriter._sequence_pointers``), so a
    split is one range of it. Splits of text that was already tokenized are ranges of the same file
    (``token_files.py``).
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
    """Returns the number of training sequences. Each needs one more token as its last label."""
    return (len(tokens) - 1) // seq_length


def sequence_tokens(tokens: np.ndarray, seq_length: int, number: int) -> np.ndarray:
    """Returns the tokens of a sequence and the next token, int64 [seq_length + 1]."""
    start = number * seq_length
    ids: np.ndarray = tokens[start : start + seq_length + 1].astype(np.int64)
    return ids


def sequence_prediction_mask(
    tokens: np.ndarray, loss_mask: np.ndarray | None, seq_length: int, number: int, end: int | None
) -> Tensor:
    """Returns the ``prediction_mask`` of a training sequence, bool [seq_length]."""
    ids, mask = (
        None if values is None else torch.from_numpy(sequence_tokens(values, seq_length, number))
        for values in (tokens, loss_mask)
    )
    return prediction_mask(ids, end, None if mask is None else mask.bool())


def sequence_order(numbers: np.ndarray, total: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the sequence indices ``numbers``, int64 [n], in the random order of an epoch.

    Sequences of a subset have the same order as among all ``total`` sequences. So training on
    cached logits of an epoch's first sequences has the same batches as without a cache.
    """
    sort_keys = np.random.default_rng([seed, epoch]).random(total)
    ordered: np.ndarray = numbers[np.argsort(sort_keys[numbers], kind="stable")]
    return ordered


def weighted_sequences(
    weights: Mapping[str, float], sources: Sequence[SourceTokens], seq_length: int, total: int
) -> list[np.ndarray]:
    """Returns for each source of ``weights``, in order, the indices of its sequences, int64 [n].

    Args:
        weights: Weights by source.
        sources: All sources of the split, in the order of the text.
        seq_length: Tokens of a sequence.
        total: Number of training sequences in the split, see ``count_sequences``.

    Raises:
        RecipeError: A source has no whole sequence with a next token.
    """
    # The split's last sequence is no training sequence if no token follows it.
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
                f"remove it, or give it more text; sources with text: {', '.join(spans)}",
            )
    return [spans[name] for name in weights]


def blend(weights: Sequence[float], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Assigns samples to sources as Megatron's ``BlendedDataset`` does.

    Each sample goes to the source whose number of samples is furthest below its share by weight.

    Returns:
        The source of each sample, int16 [samples], and the sample's index within its source, int64
        [samples]. Among the first n samples, for any n, no source exceeds its share by 1 or more.
    """
    sources, numbers = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    fractions = np.array(weights, dtype=np.float64) / math.fsum(weights)
    helpers.build_blending_indices(sources, numbers, fractions, len(fractions), samples, False)
    return sources, numbers
