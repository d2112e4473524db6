"""From sources to parts of tokens: streamed, without duplicates, and taken up again when killed."""

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
"""What is tokenized at a time, whichever comes first."""
KEEP_SECONDS = 10.0
"""Work that a killed process may lose."""


@dataclass
class PreparationState:
    """What was taken, and where the next document is."""

    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Bytes and documents of each part."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Tokens of each source in each part, in order."""
    done: int = 0
    """Sources that were read to their end."""
    state: Any = None
    """Of the reader of the next one."""
    documents: int = 0
    """That were read of it."""
    tokens: int = 0
    """That were taken of it."""
    conversations: dict[str, dict[str, int]] = field(default_factory=dict)
    """By source of conversations, what became of how many."""


def prepare(
    cfg: PrepareDataConfig,
    tokenizer: DocumentTokenizer,
    folder: Path,
    log: MetricsLog,
    chat: ChatTokenizer | None = None,
    places: Mapping[str, str] | None = None,
) -> PreparationState:
    """Writes ``.bin`` and ``.idx`` of all parts, going on with what a killed process left.

    Held-out sources come first: of a document that is also in a source for training, theirs is the
    copy that stays. What is taken is decided here, in the order of the text, so that the number of
    processes changes nothing.
    Conversations need a tokenizer of their own, ``chat``; ``places`` are where sources are read
    that are not read where they say.
    """
    names = list(source_names(cfg.all_sources()).items())
    places = places or {}
    with Ledger(folder / "ledger.sqlite") as ledger:
        progress = PreparationState(**(ledger.progress() or {}))
        with PartWriter(folder, PARTS, progress.sizes, marked=chat is not None) as writer:
            progress.sizes = writer.sizes
            store = _Store(ledger, writer, progress)
            for name, source in names[progress.done :]:
                encoder = chat if chat and cfg.is_chat(source) else tokenizer
                reader = read_source(
                    places.get(source, source),
                    cfg.text_field,
                    progress.state,
                    chat=encoder is chat,
                )
                for share in _take_source(cfg, name, source, reader, encoder, store):
                    percent = round(100 * (progress.done + share) / len(names))
                    log.progress("tokenize", percent, 100, source=source)
                store.finish_source()
    return progress


@dataclass
class _Store:
    """Everything that is written, which is kept together or not at all."""

    ledger: Ledger
    writer: PartWriter
    progress: PreparationState
    kept: float = field(default_factory=time.monotonic)

    def take(self, name: str, documents: Iterable[tuple[str, Encoded]]) -> None:
        """Adds documents to their parts, in order."""
        for part, each in documents:
            self.writer.add(part, each.ids, each.learnt)
            of_part = self.progress.sources.setdefault(part, {})
            of_part[name] = of_part.get(name, 0) + len(each.ids)

    def position(self, part: str) -> int:
        """Tokens of a part so far."""
        return self.writer.sizes[part][0] // 4

    def keep_sometimes(self) -> None:
        if time.monotonic() - self.kept > KEEP_SECONDS:
            self._keep()

    def finish_source(self) -> None:
        self.progress.done += 1
        self.progress.state, self.progress.documents, self.progress.tokens = None, 0, 0
        self._keep()

    def _keep(self) -> None:
        self.writer.flush()
        self.ledger.keep(asdict(self.progress))
        self.kept = time.monotonic()


@dataclass(frozen=True)
class _Batch:
    documents: list[Document]
    state: Any
    """Of the reader after them."""
    share: float


def _take_source(
    cfg: PrepareDataConfig,
    name: str,
    source: str,
    reader: Reader,
    encoder: DocumentTokenizer | ChatTokenizer,
    store: _Store,
) -> Iterator[float]:
    """Takes a source's documents up to its limits; yields the share of it that is done."""
    progress, only_heldout = store.progress, source in cfg.heldout_sources
    fractions = {"heldout": 1.0} if only_heldout else cfg.fractions()
    most, budget = (None, None) if only_heldout else (cfg.max_documents, cfg.max_tokens)
    chat = encoder if isinstance(encoder, ChatTokenizer) else None
    left = None if most is None else most - progress.documents
    for encoded, batch in encode_all(encoder, _batches(reader, left), cfg.processes):
        taken: list[tuple[str, Encoded]] = []
        for document, each in zip(batch.documents, encoded, strict=True):
            known_as = digest(document.text)
            if store.ledger.is_new(known_as):
                taken.append((part_of(draw_of(document, known_as), fractions), each))
                progress.tokens += len(each.ids)
            if budget is not None and progress.tokens >= budget:
                break
        store.take(name, _packed(chat, taken, name, store) if chat else taken)
        if budget is not None and progress.tokens >= budget:
            return
        progress.documents += len(batch.documents)
        progress.state = batch.state
        store.keep_sometimes()
        yield max(
            batch.share,
            progress.documents / most if most else 0,
            progress.tokens / budget if budget else 0,
        )


def _packed(
    chat: ChatTokenizer, taken: list[tuple[str, Encoded]], name: str, store: _Store
) -> Iterator[tuple[str, Encoded]]:
    """Conversations that can be learnt from, none of them over the end of a window."""
    count = Counter(store.progress.conversations.get(name, {}))
    for part in PARTS:
        whole = [each for of, each in taken if of == part and not each.left_out]
        before = sum(len(each.ids) for each in whole)
        packed = list(pack(whole, store.position(part), chat.seq_length, chat.end))
        count["taken"] += len(whole)
        count["cut"] += sum(each.cut for each in whole)
        count["tokens"] += before
        count["tokens to fill windows"] += sum(len(each.ids) for each in packed) - before
        count["tokens of answers"] += sum(int(np.sum(each.learnt)) for each in whole)
        yield from ((part, each) for each in packed)
    count.update(each.left_out for _, each in taken if each.left_out)
    store.progress.conversations[name] = dict(count)


def _batches(reader: Reader, documents: int | None) -> Iterator[tuple[list[str], _Batch]]:
    """The next documents of a reader, so many of them at most, some at a time."""
    taken: list[Document] = []
    size = 0
    for document in islice(reader, documents):
        taken.append(document)
        size += len(document.text)
        if len(taken) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield [each.text for each in taken], _Batch(taken, reader.state(), reader.share())
            taken, size = [], 0
    if taken:
        yield [each.text for each in taken], _Batch(taken, reader.state(), reader.share())
