"""Tokenizes sources and writes the splits. Drops duplicates, and resumes after a kill."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.stage import StoppedByDeadlineError, rank, time_is_up
from recipes.data.chat import ChatTokenizer, pack
from recipes.data.corpus import (
    SPLITS,
    TOKEN_BYTES,
    Document,
    Reader,
    digest,
    read_source,
    split_digest,
    split_number,
    split_of,
)
from recipes.data.ledger import Ledger
from recipes.data.settings import PrepareDataConfig
from recipes.data.sources import fetch_wheels, parse_source, source_names
from recipes.data.split_writer import SplitWriter
from recipes.data.token_sequences import require_heldout_sources
from recipes.data.tokenizer import DocumentTokenizer, Encoded, broadcast, encode_on_ranks

BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 1 << 18
"""A batch for the tokenizer is complete when it reaches one of these limits."""
HELD_OUT = "heldout.digests"
"""File with the digests of all held-out documents, sorted."""
EARLIER = "earlier.digests"
"""Copy of ``HELD_OUT`` from the stage's input ``held_out``. Its documents stay held out."""
NO_SPLIT = ""
"""Stands in for the split of a conversation that is left out. The conversation is only counted."""
SAVE_SECONDS = 10.0
"""Minimum time between two saves. A killed process loses the work since the last save."""


@dataclass(frozen=True)
class _Batch:
    documents: list[Document]
    reader_state: Any
    """State of the source's reader after these documents."""
    fraction: float
    """Fraction of the source that the reader has read."""


EncodedBatches = closing[Generator[tuple[list[Encoded], _Batch], None, None]]
"""A source's batches, in order: the encoded documents of each batch, and the batch."""


@dataclass
class PreparationState:
    """Counts of the text written so far, and the position of the next document to read."""

    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """``SplitWriter.sizes``: bytes of tokens and number of documents, by split."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of tokens by split and source name. Sources are in the order of the split's text."""
    finished_sources: int = 0
    reader_state: Any = None
    """State of the current source's reader."""
    documents: int = 0
    """Documents read from the current source."""
    tokens: int = 0
    """Tokens written from the current source."""
    conversations: dict[str, dict[str, int]] = field(default_factory=dict)
    """Counts by source and by name, as in ``DatasetResult.conversations``."""


@dataclass(frozen=True)
class _Sources:
    """Opens and encodes the sources of a config."""

    cfg: PrepareDataConfig
    tokenizer: DocumentTokenizer
    chat: ChatTokenizer | None
    replacements: Mapping[str, str]
    """Maps a source of the config to the source or file that is read instead."""

    def open(self, source: str, reader_state: Any) -> Reader:
        """Opens a source. ``reader_state`` of an earlier reader resumes after its last document."""
        return read_source(
            self.replacements.get(source, source),
            self.cfg.text_field,
            reader_state,
            chat=self.cfg.is_chat(source),
            leave_out=True,  # unusable conversations, with the reason
            limit_bytes=self.cfg.limit_bytes(source),
        )

    def encode(self, source: str, reader_state: Any, documents_read: int) -> EncodedBatches:
        """Encodes the documents of a source that follow the first ``documents_read``."""
        encoder = self.chat if self.chat and self.cfg.is_chat(source) else self.tokenizer
        max_documents = _max_documents(self.cfg, source)
        remaining = max_documents - documents_read if max_documents else None
        batches = _batches(self.open(source, reader_state), remaining)
        return closing(encode_on_ranks(encoder, batches, self.cfg.processes))

    def require_readable(self) -> None:
        """Reads a document of each hub dataset, to fail before hours of work on earlier sources.

        Raises:
            RecipeError: A dataset cannot be read.
        """
        for source in self.cfg.all_sources():
            if parse_source(source).hub:
                next(iter(self.open(source, None)), None)


def prepare(
    cfg: PrepareDataConfig,
    tokenizer: DocumentTokenizer,
    folder: Path,
    log: MetricsLog,
    chat: ChatTokenizer | None = None,
    replacements: Mapping[str, str] | None = None,
) -> PreparationState:
    """Writes ``.bin`` and ``.idx`` of all splits; continues the work of a killed process.

    ``EARLIER`` and held-out sources come first, so their documents stay held out if other sources
    repeat them. Only rank 0 drops duplicates and assigns splits, so the result is the same for any
    number of ranks and processes. Other ranks tokenize, and return an empty state.

    ``chat`` tokenizes conversations; ``None`` if no source has any. ``replacements`` maps a source
    of the config to the source or file that is read instead.
    """
    sources = _Sources(cfg, tokenizer, chat, replacements or {})
    if rank() != 0:
        return _encode_for_rank_0(sources)
    named_sources = list(source_names(cfg.all_sources()).items())
    fetch_wheels(cfg.all_sources(), log)
    with Ledger(folder / "ledger.sqlite") as ledger:
        state = PreparationState(**(ledger.progress() or {}))
        if state == PreparationState():  # nothing is written yet
            sources.require_readable()
        ledger.exclude(cfg.excluded_documents)
        ledger.read_held_out(folder / EARLIER)
        with SplitWriter(folder, SPLITS, state.sizes, masked=chat is not None) as writer:
            state.sizes = writer.sizes
            store = _Store(ledger, writer, state)
            try:
                for name, source in named_sources[state.finished_sources :]:
                    # Tells the other ranks what to encode next.
                    broadcast((state.finished_sources, state.reader_state, state.documents))
                    # After an error, closing ``encoded`` ends the other ranks' work on this source.
                    # They then wait for the next message, which is the error.
                    with sources.encode(source, state.reader_state, state.documents) as encoded:
                        for fraction in _write_source(cfg, name, source, encoded, chat, store):
                            progress = (state.finished_sources + fraction) / len(named_sources)
                            log.progress("tokenize", round(100 * progress), 100, source=source)
                    store.finish_source(cfg)
            except StoppedByDeadlineError as error:
                broadcast(error)
                raise
            broadcast(None)  # no more sources
            ledger.write_held_out(folder / HELD_OUT)
    return state


def _encode_for_rank_0(sources: _Sources) -> PreparationState:
    """Encodes this rank's batches of the sources that rank 0 writes; returns an empty state.

    Raises:
        RecipeError: Rank 0 stopped with this error.
    """
    while (message := broadcast(None)) is not None:
        if isinstance(message, RecipeError):
            raise message
        source_number, reader_state, documents = message
        source = sources.cfg.all_sources()[source_number]
        with sources.encode(source, reader_state, documents) as encoded:
            for _ in encoded:  # yields nothing, because only rank 0 gets batches
                pass
    return PreparationState()


@dataclass
class _Store:
    """The ledger, the splits and the state. They are saved together."""

    ledger: Ledger
    writer: SplitWriter
    state: PreparationState
    saved_at: float = field(default_factory=time.monotonic)
    """Monotonic time of the last save."""

    def assign_split(
        self, document: Document, fractions: Mapping[str, float], *, chat: bool
    ) -> str:
        """Returns a document's split. Stores the digest of a held-out document in the ledger."""
        # For a conversation, this is the digest of its question only.
        split_key = split_digest(document.text, chat=chat)
        split = split_of(split_number(document, split_key), fractions)
        if self.ledger.is_held_out(split_key):
            return "heldout"
        if split == "heldout":
            self.ledger.hold_out(split_key)
        return split

    def add(self, source_name: str, documents: Iterable[tuple[str, Encoded]]) -> None:
        """Appends documents of a source to the splits that they are paired with, in order."""
        for split, document in documents:
            self.writer.add(split, document.ids, document.loss_mask)
            tokens = self.state.sources.setdefault(split, {})
            tokens[source_name] = tokens.get(source_name, 0) + len(document.ids)

    def save_if_due(self) -> None:
        """Saves at the deadline, or if ``SAVE_SECONDS`` have passed since the last save.

        Raises:
            StoppedByDeadlineError: The deadline has passed. The work was saved.
        """
        if time_is_up():
            self._save()
            raise StoppedByDeadlineError(
                f"stopped at the deadline, after {self.state.documents} documents of source "
                f"{self.state.finished_sources + 1}.",
                "the same command resumes",
            )
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self._save()

    def finish_source(self, cfg: PrepareDataConfig) -> None:
        """Saves that the current source is finished.

        Raises:
            RecipeError: All held-out sources are finished, and one of them is too short. The end of
                the source is not saved, so a resumed run checks again.
        """
        # The held-out sources are the first sources.
        if self.state.finished_sources + 1 == len(cfg.heldout_sources):
            try:
                require_heldout_sources(cfg, self.state.sources.get("heldout", {}))
            except RecipeError as error:
                broadcast(error)
                raise
        self.state.finished_sources += 1
        self.state.reader_state, self.state.documents, self.state.tokens = None, 0, 0
        self._save()

    def _save(self) -> None:
        self.writer.flush()
        self.ledger.save(asdict(self.state))
        self.saved_at = time.monotonic()


def _write_source(
    cfg: PrepareDataConfig,
    name: str,
    source: str,
    batches: Iterator[tuple[list[Encoded], _Batch]],
    chat: ChatTokenizer | None,
    store: _Store,
) -> Iterator[float]:
    """Writes a source's documents up to its limits; yields the finished fraction of the source."""
    state, is_chat = store.state, cfg.is_chat(source)
    is_heldout_source = source in cfg.heldout_sources
    fractions = {"heldout": 1.0} if is_heldout_source else cfg.fractions()
    max_documents = _max_documents(cfg, source)
    max_tokens = cfg.token_limit(source)
    for encoded_documents, batch in batches:
        new_documents: list[tuple[str, Encoded]] = []  # with their splits
        for document, encoded in zip(batch.documents, encoded_documents, strict=True):
            if encoded.left_out_reason:
                new_documents.append((NO_SPLIT, encoded))
                continue
            is_new = store.ledger.add_if_new(digest(document.text, chat=is_chat))
            if is_new:
                split = store.assign_split(document, fractions, chat=is_chat)
                new_documents.append((split, encoded))
                state.tokens += len(encoded.ids)
            if state.tokens >= max_tokens:
                break
        if is_chat and chat:  # the result has no documents in ``NO_SPLIT``
            new_documents = list(_pack_splits(chat, new_documents, name, store))
        store.add(name, new_documents)
        if state.tokens >= max_tokens:
            return  # the caller saves, with ``finish_source``
        state.documents += len(batch.documents)
        state.reader_state = batch.reader_state
        store.save_if_due()
        yield max(  # the source ends when one of these reaches 1
            batch.fraction,
            state.documents / max_documents if max_documents else 0,
            state.tokens / max_tokens,
        )


def _max_documents(cfg: PrepareDataConfig, source: str) -> int | None:
    """Returns how many documents of a source are used at most. Held-out sources have no limit."""
    return None if source in cfg.heldout_sources else cfg.max_documents


def _pack_splits(
    chat: ChatTokenizer, conversations: list[tuple[str, Encoded]], name: str, store: _Store
) -> Iterator[tuple[str, Encoded]]:
    """Yields each split's conversations in packed order. Updates the counts of source ``name``."""
    counts = Counter(store.state.conversations.get(name, {}))
    for split in SPLITS:
        usable = [
            encoded for split_of_encoded, encoded in conversations if split_of_encoded == split
        ]
        tokens = sum(len(encoded.ids) for encoded in usable)
        written_bytes, _ = store.writer.sizes[split]
        written_tokens = written_bytes // TOKEN_BYTES  # an incomplete last sequence is filled first
        packed = list(pack(usable, written_tokens, chat.seq_length, chat.end))
        counts["used"] += len(usable)
        counts["shortened"] += sum(encoded.shortened for encoded in usable)
        counts["tokens"] += tokens
        counts["padding tokens"] += sum(len(encoded.ids) for encoded in packed) - tokens
        counts["answer tokens"] += sum(int(np.sum(encoded.loss_mask)) for encoded in usable)
        yield from ((split, encoded) for encoded in packed)
    reasons = (encoded.left_out_reason for _, encoded in conversations)
    counts.update(reason for reason in reasons if reason)
    store.state.conversations[name] = dict(counts)


def _batches(reader: Reader, limit: int | None) -> Iterator[tuple[list[str], _Batch]]:
    """Yields the first ``limit`` documents (or all) in batches: the texts, and a ``_Batch``."""
    remaining_documents = islice(reader, limit)
    while True:
        documents, characters = list[Document](), 0
        for document in remaining_documents:
            documents.append(document)
            characters += len(document.text)
            if len(documents) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                break
        if not documents:
            return
        batch = _Batch(documents, reader.state(), reader.fraction())
        yield [document.text for document in documents], batch
