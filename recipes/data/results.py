"""What prepared text holds. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SourceTokens:
    """A source's tokens in one part of the text."""

    source: str
    tokens: int


@dataclass(frozen=True)
class DatasetResult:
    """Text in parts that share no document."""

    documents: dict[str, int]
    """By part."""
    tokens: dict[str, int]
    sources: list[str]
    heldout_sources: list[SourceTokens] = field(default_factory=list)
    """In the order in which they lie in the held-out part; older text does not say."""
