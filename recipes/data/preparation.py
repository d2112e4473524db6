"""Tokenizes sources into parts: streamed, without duplicates, and resumed when killed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from recipes.core.metrics import MetricsLog
from recipes.data.chat import ChatTokenizer, pack
from recipes.data.corpus import PARTS, Document, Reader, digest, draw_of, part_of, read_source
from recipes.data.ledger import Ledger
from recipes.data.part_writer import PartWriter
from recipes.data.settings import PrepareDataConfig
from recipes.data.sources import source_names
from recipes.data.tokenizer import DocumentTokenizer, Encoded, encode_all

BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 1 << 18
"""Limits of a batch for the tokenizer, whichever is reached first."""
KEEP_SECONDS = 10.0
"""Work that a killed process may lose."""


@dataclass
class PreparationState:
    """What was written, and where the next document is."""

    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Bytes and documents of each part."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Tokens of each source by part, in order."""
    done: int = 0
    """Finished sources."""
    state: Any = None
    """State of the current source's reader."""
    documents: int = 0
    """Documents read of the current source."""
    tokens: int = 0
    """Tokens written of the current source."""
    conversations: dict[str, dict[str, int]] = field(default_factory=dict)
    """By source of conversations, how many were written, shortened and left out, and why."""


def prepare(
    cfg: PrepareDataConfig,
    tokenizer: DocumentTokenizer,
    folder: Path,
    log: MetricsLog,
    chat: ChatTokenizer | None = None,
    places: Mapping[str, str] | None = None,
) -> PreparationState:
    """Writes ``.bin`` and ``.idx`` of all parts, resuming what a killed process left.

    Held-out sources come first, so that they keep a document that a training source has, too.
    Duplicates and parts are decided in this process, in the order of the text, so that the number
    of processes does not affect the result.

    Args:
        cfg: The stage's config.
        tokenizer: For texts.
        folder: Where to write.
        log: Metrics file.
        chat: For conversations.
        places: Where to read sources that are stored elsewhere than their name says.
    """
    names = list(source_names(cfg.all_sources()).items())
    with Ledger(folder / "ledger.sqlite") as ledger:
        state = PreparationState(**(ledger.progress() or {}))
        with PartWriter(folder, PARTS, state.sizes, marked=chat is not None) as writer:
            state.sizes = writer.sizes
            store = _Store(ledger, writer, state)
            for name, source in names[state.done :]:
                encoder = chat if chat and cfg.is_chat(source) else tokenizer
                place = (places or {}).get(source, source)
                reader = read_source(place, cfg.text_field, state.state, chat=encoder is chat)
                for fraction in _write_source(cfg, name, source, reader, encoder, store):
                    percent = round(100 * (state.done + fraction) / len(names))
                    log.progress("tokenize", percent, 100, source=source)
                store.finish_source()
    return state


@dataclass
class _Store:
    """Ledger, parts and state, which are saved together."""

    ledger: Ledger
    writer: PartWriter
    state: PreparationState
    saved_at: float = field(default_factory=time.monotonic)

    def add(self, source: str, documents: Iterable[tuple[str, Encoded]]) -> None:
        """Appends documents to their parts, in order."""
        for part, document in documents:
            self.writer.add(part, document.ids, document.learnt)
            tokens = self.state.sources.setdefault(part, {})
            tokens[source] = tokens.get(source, 0) + len(document.ids)

    def save_sometimes(self) -> None:
        if time.monotonic() - self.saved_at > KEEP_SECONDS:
            self._save()

    def finish_source(self) -> None:
        self.state.done += 1
        self.state.state, self.state.documents, self.state.tokens = None, 0, 0
        self._save()

    def _save(self) -> None:
        self.writer.flush()
        self.ledger.keep(asdict(self.state))
        self.saved_at = time.monotonic()


@dataclass(frozen=True)
class _Batch:
    documents: list[Document]
    state: Any
    """Of the reader, after them."""
    fraction: float


def _write_source(
    cfg: PrepareDataConfig,
    name: str,
    source: str,
    reader: Reader,
    encoder: DocumentTokenizer | ChatTokenizer,
    store: _Store,
) -> Iterator[float]:
    """Writes a source's documents up to its limits; yields the fraction that is done."""
    state, only_heldout = store.state, source in cfg.heldout_sources
    fractions = {"heldout": 1.0} if only_heldout else cfg.fractions()
    max_documents, max_tokens = (
        (None, None) if only_heldout else (cfg.max_documents, cfg.max_tokens)
    )
    remaining = None if max_documents is None else max_documents - state.documents
    for encoded, batch in encode_all(encoder, _batches(reader, remaining), cfg.processes):
        new: list[tuple[str, Encoded]] = []
        for document, each in zip(batch.documents, encoded, strict=True):
            document_digest = digest(document.text)
            if store.ledger.is_new(document_digest):
                new.append((part_of(draw_of(document, document_digest), fractions), each))
                state.tokens += len(each.ids)
            if max_tokens is not None and state.tokens >= max_tokens:
                break
        if isinstance(encoder, ChatTokenizer):
            new = list(_packed(encoder, new, name, store))
        store.add(name, new)
        if max_tokens is not None and state.tokens >= max_tokens:
            return
        state.documents += len(batch.documents)
        state.state = batch.state
        store.save_sometimes()
        yield max(
            batch.fraction,
            state.documents / max_documents if max_documents else 0,
            state.tokens / max_tokens if max_tokens else 0,
        )


def _packed(
    chat: ChatTokenizer, conversations: list[tuple[str, Encoded]], source: str, store: _Store
) -> Iterator[tuple[str, Encoded]]:
    """Yields the usable conversations of each part, packed into whole sequences."""
    count = Counter(store.state.conversations.get(source, {}))
    for part in PARTS:
        usable = [each for of, each in conversations if of == part and not each.left_out]
        tokens = sum(len(each.ids) for each in usable)
        position = store.writer.sizes[part][0] // 4
        packed = list(pack(usable, position, chat.seq_length, chat.end))
        count["used"] += len(usable)
        count["shortened"] += sum(each.cut for each in usable)
        count["tokens"] += tokens
        count["padding tokens"] += sum(len(each.ids) for each in packed) - tokens
        count["answer tokens"] += sum(int(np.sum(each.learnt)) for each in usable)
        yield from ((part, each) for each in packed)
    count.update(each.left_out for _, each in conversations if each.left_out)
    store.state.conversations[source] = dict(count)


def _batches(reader: Reader, limit: int | None) -> Iterator[tuple[list[str], _Batch]]:
    """Yields the next documents of a reader in batches, up to a limit, and their texts."""
    documents: list[Document] = []
    size = 0
    for document in islice(reader, limit):
        documents.append(document)
        size += len(document.text)
        if len(documents) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield _texts(documents), _Batch(documents, reader.state(), reader.fraction())
            documents, size = [], 0
    if documents:
        yield _texts(documents), _Batch(documents, reader.state(), reader.fraction())


def _texts(documents: Iterable[Document]) -> list[str]:
    return [document.text for document in documents]
