"""Results of ``prepare_data``. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SourceTokens:
    """A source's tokens in one part of the text."""

    source: str
    tokens: int


@dataclass(frozen=True)
class TrainedSource:
    """A source's part in a training run."""

    source: str
    tokens: int
    """Tokens that the training sees, to within a sequence."""
    epochs: float
    """How often it sees each token of the source."""


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
    """Text in parts that share no document."""

    documents: dict[str, int]
    """Documents by part."""
    tokens: dict[str, int]
    sources: list[str]
    source_tokens: dict[str, list[SourceTokens]]
    """Sources of each part, in the order of the text."""
    document_end: int
    """Token after every document; predictions of what follows it are not counted."""
    document_begin: int | None = None
    """Token before every document, if there is one."""
    seq_length: int | None = None
    """Length of packed sequences; ``None`` without conversations."""
    conversations: dict[str, dict[str, int]] = field(default_factory=dict)
    """By source of conversations: numbers of used, shortened and left-out ones, and of tokens."""
    sample: str = ""
    """Start of a text that was tokenized before, decoded to compare it with the tokenizer."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """Origins by source, as written in the settings."""

    def trained(self, tokens: int, weights: Mapping[str, float]) -> list[TrainedSource]:
        """Returns how a training run on ``tokens`` tokens uses each source.

        Args:
            tokens: Tokens of the training.
            weights: Weights by source; without any, sources count by their tokens.
        """
        available = {each.source: each.tokens for each in self.source_tokens["train"]}
        parts = weights or available
        shares = {name: tokens * part / sum(parts.values()) for name, part in parts.items()}
        return [
            TrainedSource(name, round(shares[name]), shares[name] / available[name])
            for name in shares
            if available.get(name)
        ]

    def licence(self, source: str) -> str:
        """Returns a source's licence, in words."""
        return self.origins.get(source, Origin()).licence or "not recorded"


def in_words(conversations: Mapping[str, int]) -> str:
    """Lists the counts of a source's conversations."""
    return ", ".join(f"{number:,} {what}" for what, number in conversations.items() if number)
