"""Results of ``prepare_data``. Does not import torch."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

NOT_COMPARED = (
    "Its duplicates are not removed, and it is not compared with held-out text and benchmarks."
)
"""Note in plans and reports on text of ``data.prefix``. Its documents are tokens, not text."""


@dataclass(frozen=True)
class SourceTokens:
    """Number of tokens of a source in one split."""

    source: str
    """Name from ``source_names``."""
    tokens: int


@dataclass(frozen=True)
class TrainedSource:
    """How much of a source a training run uses."""

    source: str
    tokens: int
    """Number of trained tokens. With weights, it is accurate to one sequence. Without weights, it
    is the expected number, because the order of sequences is random."""
    epochs: float
    """Average number of times that the run trains on each token of the source."""


@dataclass(frozen=True)
class Origin:
    """Origin of a source's text."""

    licence: str | None = None
    """Licence from the source's options, or from its card on the hub."""
    commit: str | None = None
    """Commit of a dataset on a hub: the newest, or its configured revision."""
    sha256: str | None = None
    """SHA-256 of a file that the teacher wrote."""


@dataclass(frozen=True)
class DatasetResult:
    """Tokenized text in splits that share no document."""

    documents: dict[str, int]
    """Number of documents by split."""
    tokens: dict[str, int]
    """Number of tokens by split."""
    sources: list[str]
    source_tokens: dict[str, list[SourceTokens]]
    """Tokens of each source by split, in the order of the split's text."""
    document_end: int
    """Id of the token after every document. The prediction after it is not in the loss."""
    document_begin: int | None = None
    """Id of the token before every document, if any."""
    seq_length: int | None = None
    """Tokens of a packed sequence; ``None`` if there are no conversations."""
    conversations: dict[str, dict[str, int]] = field(default_factory=dict)
    """By source, then by name: the numbers of ``used`` and ``shortened`` conversations and of those
    left out for each reason; ``tokens``, ``padding tokens`` and ``answer tokens``."""
    sample: str = ""
    """First tokens of ``data.prefix``, decoded. If the tokenizer fits, the text is readable."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """Origins by source. The keys are the sources as written in the settings."""

    def with_sequences(self, numbers: Iterable[int], seq_length: int) -> DatasetResult:
        """Returns a copy whose tokens in the training split are those of some sequences.

        ``numbers`` are the indices of the sequences. All tokens of a sequence count for the source
        of its first token.
        """
        train = self.source_tokens["train"]
        # The position in the split at which each source ends.
        ends = list(accumulate(entry.tokens for entry in train))
        source_indices = (bisect_right(ends, int(number) * seq_length) for number in numbers)
        sequences = Counter(source_indices)  # number of sequences by index of the source
        new_train = [
            replace(entry, tokens=sequences[index] * seq_length)
            for index, entry in enumerate(train)
        ]
        return replace(self, source_tokens=self.source_tokens | {"train": new_train})

    def trained_sources(self, tokens: int, weights: Mapping[str, float]) -> list[TrainedSource]:
        """Returns how much of each source a run with ``tokens`` training tokens uses.

        If ``weights``, by source, is empty, a source's weight is its number of tokens.
        """
        available = {entry.source: entry.tokens for entry in self.source_tokens["train"]}
        weights = weights or available
        total = sum(weights.values())
        trained_tokens = {name: tokens * weight / total for name, weight in weights.items()}
        return [
            TrainedSource(name, round(trained), trained / available[name])
            for name, trained in trained_tokens.items()
            if available.get(name)  # a source may have no training text
        ]

    def licence(self, source: str) -> str:
        """Returns a source's licence, or "not recorded"."""
        return self.origins.get(source, Origin()).licence or "not recorded"


def describe_counts(conversations: Mapping[str, int]) -> str:
    """Returns the counts of a source's conversations as text, such as "12 used, 3 too long"."""
    return ", ".join(f"{count:,} {name}" for name, count in conversations.items() if count)
