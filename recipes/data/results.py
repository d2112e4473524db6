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
"""Note in plans and reports on text that was tokenized elsewhere, whose words are not known."""


@dataclass(frozen=True)
class SourceTokens:
    """Number of tokens of a source in one split."""

    source: str
    tokens: int


@dataclass(frozen=True)
class TrainedSource:
    """How much of a source a training run uses."""

    source: str
    tokens: int
    """Tokens that the run trains on: with weights accurate to one sequence, without weights the
    expected number in the random order of sequences."""
    epochs: float
    """How often the run trains on each token of the source."""


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
    """Sources of each split with their tokens, in the order of the split's text."""
    document_end: int
    """Token after every document. The prediction of the next document's start is not in the loss.
    """
    document_begin: int | None = None
    """Token before every document, if there is one."""
    seq_length: int | None = None
    """Length of packed sequences; ``None`` if there are no conversations."""
    conversations: dict[str, dict[str, int]] = field(default_factory=dict)
    """Counts by source: conversations used, shortened, and left out by reason; and tokens."""
    sample: str = ""
    """First tokens of ``data.prefix``, decoded. Readable text shows that the tokenizer fits."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """Origins by source. The keys are the sources as written in the settings."""

    def with_sequences(self, numbers: Iterable[int], seq_length: int) -> DatasetResult:
        """Returns the result of a text with only these training sequences of the text.

        A sequence counts for the source of its first token.
        """
        train = self.source_tokens["train"]
        ends = list(accumulate(entry.tokens for entry in train))
        counts = Counter(bisect_right(ends, int(number) * seq_length) for number in numbers)
        chosen = [SourceTokens(e.source, counts[n] * seq_length) for n, e in enumerate(train)]
        return replace(self, source_tokens=self.source_tokens | {"train": chosen})

    def trained_sources(self, tokens: int, weights: Mapping[str, float]) -> list[TrainedSource]:
        """Returns how a training run on ``tokens`` tokens uses each source.

        Args:
            tokens: Number of tokens of the run.
            weights: Weights by source; if empty, a source's weight is its number of tokens.
        """
        available = {entry.source: entry.tokens for entry in self.source_tokens["train"]}
        weights = weights or available
        total = sum(weights.values())
        trained = {name: tokens * weight / total for name, weight in weights.items()}
        return [
            TrainedSource(name, round(trained[name]), trained[name] / available[name])
            for name in trained
            if available.get(name)
        ]

    def licence(self, source: str) -> str:
        """Returns a source's licence, in words."""
        return self.origins.get(source, Origin()).licence or "not recorded"


def describe_counts(conversations: Mapping[str, int]) -> str:
    """Returns the counts of a source's conversations as text."""
    return ", ".join(f"{count:,} {name}" for name, count in conversations.items() if count)
