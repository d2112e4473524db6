"""What prepared text holds. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SourceTokens:
    """A source's tokens in one part of the text."""

    source: str
    tokens: int


@dataclass(frozen=True)
class Origin:
    """Where a source's text is from, as far as that is known."""

    licence: str | None = None
    """As its options or its hub's card name it."""
    commit: str | None = None
    """Of a dataset on a hub: what was newest, unless its revision was given."""
    sha256: str | None = None
    """Of what the teacher wrote."""


@dataclass(frozen=True)
class DatasetResult:
    """Text in parts that share no document."""

    documents: dict[str, int]
    """By part."""
    tokens: dict[str, int]
    sources: list[str]
    source_tokens: dict[str, list[SourceTokens]]
    """By part, in the order in which they lie in it."""
    document_end: int
    """Token after every document; predictions of what follows it are not counted."""
    document_begin: int | None = None
    """Token before every document, if there is one."""
    seq_length: int | None = None
    """Of the windows that conversations are whole in; ``None`` if there are none."""
    conversations: dict[str, dict[str, int]] = field(default_factory=dict)
    """By source of conversations: how many were taken, cut and left out, and their tokens."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """By source, held-out ones too, as it is written in the settings."""

    def licence(self, source: str) -> str:
        """A source's licence, in words."""
        return self.origins.get(source, Origin()).licence or "not recorded"


def in_words(conversations: Mapping[str, int]) -> str:
    """What became of a source's conversations, in words."""
    return ", ".join(f"{number:,} {what}" for what, number in conversations.items() if number)
