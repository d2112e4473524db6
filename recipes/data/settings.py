"""Settings of ``prepare_data``. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from recipes.core.constraints import Count, Fraction, Tokens, matching, one_of
from recipes.core.precision import Precision
from recipes.core.stage import StageConfig
from recipes.data import corpus
from recipes.data.sources import CHAT, FORMATS, parse_source, source_names, without_weight

SpecialToken = Annotated[str, matching(r"[<\[].+[>\]]", "a special token such as <|endoftext|>")]

BYTES_PER_TOKEN, BYTES_PER_DOCUMENT = 4.0, 400.0
"""Estimated average bytes of a token and of a document in English text. The vocabulary is assumed
to have at least 50,000 tokens. A document is assumed to be a paragraph, as in text files."""

ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
"""Common names of the token that separates documents in pretraining."""

Digest = Annotated[str, matching(r"[0-9a-f]{32}", "a digest: 32 digits and letters from a to f")]


@dataclass
class PrepareDataConfig(StageConfig):
    """Settings of ``prepare_data``."""

    sources: list[str] = field(default_factory=list, metadata={"path": True})
    """Files or patterns (types: see ``recipes/data/records.py``), ``hf://NAME[@CONFIG]:SPLIT``,
    ``pypi://`` or ``teacher://chat`` sources; see ``recipes/data/sources.py`` for their options."""
    prefix: Annotated[str, matching(".+", "a path without .bin and .idx")] | None = None
    """Tokenized text instead of ``sources``: path of Megatron's ``.bin`` and ``.idx`` files without
    suffix, such as ``/data/corpus_text_document``. Each split is a range of its documents. The
    option ``#licence=NAME`` states its licence."""
    heldout_sources: list[str] = field(default_factory=list, metadata={"path": True})
    """Text for evaluation only: no training, calibration or selection uses it."""
    format: Annotated[str, one_of(*FORMATS)] = "text"
    """Type of records in sources without ``#format``: ``text`` or ``chat``. With ``chat``, a record
    is ``{"messages": [{"role", "content"}, …]}``, and only the assistant's words count in loss and
    metrics. A source with ``#text=FIELD`` is text."""
    text_field: str = "text"
    """Field with a record's text, unless the source has the option ``text``."""
    document_end: SpecialToken | None = None
    """Token between documents. Default: the end-of-text token; ``eos_token`` if there is none.
    In an instruct model, ``eos_token`` often ends a turn instead."""
    validation_fraction: Fraction = 0.02
    """Fraction of the documents for validation in training and healing, and to rank candidates."""
    calibration_fraction: Fraction = 0.04
    """Fraction of the documents for calibration: importance scores, healing and quantization."""
    heldout_fraction: Fraction = 0.04
    """Fraction of the documents for evaluation only."""
    excluded_documents: list[Digest] = field(default_factory=list)
    """Documents to leave out of all sources, as hexadecimal digests from
    ``recipes.data.corpus.digest``. Documents of ``prefix`` are never left out."""
    max_documents: Count | None = None
    """Number of documents to read from each source; all by default. Held-out sources are read
    completely."""
    max_tokens: Tokens | None = None
    """Number of tokens to use from each source, in all splits together; does not limit held-out
    sources. The last document is not truncated."""
    seq_length: Count = 256
    """Tokens per sequence. Every split must have at least one sequence. A conversation is never
    divided between sequences."""
    precision: Precision = "32"
    """Precision of the teacher while it writes conversations."""
    processes: Count = field(default=1, metadata={"resource": True})
    """Tokenizer worker processes; does not affect the result."""

    def token_limit(self, source: str) -> float:
        """Returns how many tokens of a source are used at most; infinite without a limit."""
        parsed = parse_source(source)
        limits = [math.inf]
        # If the teacher writes the source, the option ``tokens`` says how many it generates.
        if parsed.tokens and not parsed.by_teacher:
            limits.append(float(parsed.tokens))
        if self.max_tokens and source in self.sources:  # does not limit held-out sources
            limits.append(self.max_tokens)
        return min(limits)

    def limit_bytes(self, source: str) -> float:
        """Estimates how many bytes of a source the limits allow; infinite without limits."""
        bytes_of_documents = BYTES_PER_DOCUMENT * (self.max_documents or math.inf)
        return min(BYTES_PER_TOKEN * self.token_limit(source), bytes_of_documents)

    def all_sources(self) -> list[str]:
        """Returns the held-out sources, followed by the sources for training."""
        return [*self.heldout_sources, *self.sources]

    def texts(self) -> list[str]:
        """Returns the text for training: the prefix if it is set, or else the sources."""
        return [self.prefix] if self.prefix else self.sources

    @property
    def prefix_path(self) -> Path:
        """The path in ``prefix``, without its options."""
        return Path(parse_source(self.prefix or "").path)

    def is_chat(self, source: str) -> bool:
        """Whether a source holds conversations."""
        parsed = parse_source(source)
        if parsed.by_teacher:
            return True
        # The option ``text`` names a field of plain text.
        default_format = "text" if parsed.text else self.format
        return (parsed.format or default_format) == CHAT

    def teacher_sources(self) -> list[str]:
        """Returns the sources that the teacher writes."""
        return [source for source in self.all_sources() if parse_source(source).by_teacher]

    def chat_sources(self) -> list[str]:
        """Returns the sources that hold conversations."""
        return [source for source in self.all_sources() if self.is_chat(source)]

    def training_names(self) -> list[str]:
        """Returns the names of training sources in results."""
        if self.prefix:
            return [self.prefix_path.name]
        names = source_names(self.all_sources())
        return [name for name, source in names.items() if source in self.sources]

    def weights(self) -> dict[str, float]:
        """Returns the weights of the training sources that have one, by their names in results."""
        weights = {}
        for name, source in source_names(self.all_sources()).items():
            weight = parse_source(source).weight
            if weight and source in self.sources:
                weights[name] = float(weight)
        return weights

    def without_weights(self) -> PrepareDataConfig:
        """Returns the config without the sources' weights, which do not affect prepared text."""
        return replace(self, sources=[without_weight(source) for source in self.sources])

    def fractions(self) -> dict[str, float]:
        """Returns the fraction of each split except ``train``, which gets the remainder."""
        _train, *splits = corpus.SPLITS
        return {split: getattr(self, f"{split}_fraction") for split in splits}


def default_document_end(vocabulary: Container[str], eos_token: str | None) -> str | None:
    """Returns the default of ``document_end``; ``None`` if the vocabulary has no such token."""
    candidates = (*ENDS_OF_TEXT, eos_token or "")
    return next((token for token in candidates if token in vocabulary), None)
