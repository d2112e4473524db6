"""From sources to parts of tokens: streamed, without duplicates, and taken up again when killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.core.metrics import MetricsLog
from recipes.data.corpus import PARTS, Document, Reader, digest, draw_of, part_of, read_source
from recipes.data.ledger import Ledger
from recipes.data.part_writer import PartWriter
from recipes.data.settings import PrepareDataConfig
from recipes.data.sources import source_names
from recipes.data.tokenizer import DocumentTokenizer

BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 1 << 18
"""What is tokenized at a time, whichever comes first."""
KEEP_SECONDS = 10.0
"""Work that a killed process may lose."""


@dataclass
class Progress:
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


def prepare(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, folder: Path, log: MetricsLog
) -> Progress:
    """Writes ``.bin`` and ``.idx`` of all parts, going on with what a killed process left.

    Held-out sources come first: of a document that is also in a source for training, theirs is the
    copy that stays. What is taken is decided here, in the order of the text, so that the number of
    processes changes nothing.
    """
    names = list(source_names(cfg.all_sources()).items())
    with Ledger(folder / "ledger.sqlite") as ledger:
        progress = Progress(**(ledger.progress() or {}))
        with PartWriter(folder, PARTS, progress.sizes) as writer:
            progress.sizes = writer.sizes
            store = _Store(ledger, writer, progress)
            for name, source in names[progress.done :]:
                for share in _take_source(cfg, name, source, tokenizer, store):
                    percent = round(100 * (progress.done + share) / len(names))
                    log.progress("tokenize", percent, 100, source=source)
                store.finish_source()
    return progress


@dataclass
class _Store:
    """Everything that is written, which is kept together or not at all."""

    ledger: Ledger
    writer: PartWriter
    progress: Progress
    kept: float = field(default_factory=time.monotonic)

    def take(self, name: str, part: str, ids: Any) -> None:
        self.writer.add(part, ids)
        self.progress.tokens += len(ids)
        of_part = self.progress.sources.setdefault(part, {})
        of_part[name] = of_part.get(name, 0) + len(ids)

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
    cfg: PrepareDataConfig, name: str, source: str, tokenizer: DocumentTokenizer, store: _Store
) -> Iterator[float]:
    """Takes a source's documents up to its limits; yields the share of it that is done."""
    progress, only_heldout = store.progress, source in cfg.heldout_sources
    fractions = {"heldout": 1.0} if only_heldout else cfg.fractions()
    most, budget = (None, None) if only_heldout else (cfg.max_documents, cfg.max_tokens)
    reader = read_source(source, cfg.text_field, progress.state)
    left = None if most is None else most - progress.documents
    for encoded, batch in tokenizer.encode_all(_batches(reader, left), cfg.processes):
        for document, ids in zip(batch.documents, encoded, strict=True):
            known_as = digest(document.text)
            if store.ledger.is_new(known_as):
                store.take(name, part_of(draw_of(document, known_as), fractions), ids)
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
