"""Streams the documents of a source, and assigns each to a part of the text."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import IO, Any, Protocol

import ijson

from recipes.core.errors import RecipeError
from recipes.data.sources import HubDataset, Source, TextFile, files_of, parse_source

PARTS = ("train", "validation", "calibration", "heldout")
LONGEST_PARAGRAPH = 1 << 20
"""Bytes after which a text without blank lines is split anyway, at the end of a line."""
RECORD_TYPES = (".jsonl", ".jsonl.gz", ".json")
MESSAGES = "messages"
"""Field of a conversation: ``{"messages": [{"role": "user", "content": "…"}, …]}``."""
CHECKED_CONVERSATIONS = 100
"""Conversations that a check reads."""
STRETCH = 4 << 20
"""Approximate bytes of running text that are divided among the parts together."""
TextOf = Callable[[Any, str], str]
"""Extracts a document's text from a record, given the record's location for messages."""
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ijson.JSONError)


@dataclass(frozen=True)
class Document:
    """A text and its position."""

    text: str
    """The text, or the JSON of a conversation's messages."""
    position: float | None = None
    """Start of a paragraph within its stretch of the source, from 0 to below 1. Records have none,
    since neighbours may be unrelated."""


class Reader(Protocol):
    """Iterates over the documents of a source; a new reader can resume from its state."""

    def __iter__(self) -> Iterator[Document]:
        """Yields the documents after the state that the reader was opened at."""

    def state(self) -> Any:
        """Returns the position after the last document, for a new reader, as JSON."""

    def fraction(self) -> float:
        """Returns the fraction of the source that was read; 0 where its size is unknown."""


def read_source(source: str, text_field: str, state: Any = None, *, chat: bool = False) -> Reader:
    """Opens a source of ``data.sources``, at the ``state`` of an earlier reader if given.

    Text files hold documents separated by blank lines; JSON files a list of records or a mapping to
    records; JSONL one record per line. A record is a string, a conversation, or has its text in
    ``text_field`` (``a.b`` for nested fields) or in the source's own field.
    """
    parsed = parse_source(source)
    field_text = partial(_column if parsed.hub else _text, parsed.text or text_field)
    text_of = _conversation if chat else field_text
    if parsed.hub:
        return _HubReader(parsed.hub, parsed.revision, text_of, state)
    return _FileReader(parsed, text_of, state)


def chat_problem(source: str) -> tuple[str, str] | None:
    """Checks the first conversations of a local file; returns what is wrong, and the fix."""
    parsed = parse_source(source)
    if parsed.prompts:
        return chat_problem(parsed.prompts)
    if parsed.hub or parsed.wheel or not parsed.local_files():
        return None
    if parsed.file_type not in RECORD_TYPES:
        return f"'{parsed.path}' has no conversations", f"give {' or '.join(RECORD_TYPES)}"
    try:
        for _ in islice(read_source(source, "", chat=True), CHECKED_CONVERSATIONS):
            pass
    except RecipeError as error:
        return error.what, error.fix
    return None


class _FileReader:
    """Reads files. Its state is the number of records, which a new reader skips."""

    def __init__(self, source: Source, text_of: TextOf, state: int | None) -> None:
        self._source, self._text_of, self._skip = source, text_of, state or 0
        self._files = files_of(source)
        self._total_bytes = max(1, sum(file.size for file in self._files))
        self._bytes_before, self._records = 0, 0
        self._opened: IO[bytes] | None = None

    def __iter__(self) -> Iterator[Document]:
        for file in self._files:
            with file.open() as self._opened:
                for record in self._read(file, self._opened):
                    self._records += 1
                    if self._records <= self._skip:
                        continue
                    if text := self._text_of(record.value, f"{file.name}, {record.where}").strip():
                        yield Document(text, self._position(record.offset))
            self._bytes_before, self._opened = self._bytes_before + file.size, None

    def _read(self, file: TextFile, opened: IO[bytes]) -> Iterator[_Record]:
        file_type = self._source.file_type
        try:
            if file_type == ".txt":
                yield from _paragraphs(opened)
            elif file_type == ".json":
                for number, value in enumerate(_json_records(opened), 1):
                    yield _Record(value, f"record {number}")
            else:
                yield from _json_lines(
                    gzip.GzipFile(fileobj=opened) if file_type == ".jsonl.gz" else opened
                )
        except _UNREADABLE as error:
            raise RecipeError(
                f"{file.name} cannot be read as {file_type}: {error}",
                "correct the file, or leave it out",
            ) from error

    def _position(self, offset: int | None) -> float | None:
        if offset is None:
            return None
        stretches = max(1, round(self._total_bytes / STRETCH))
        return (self._bytes_before + offset) * stretches / self._total_bytes % 1

    def state(self) -> int:
        return self._records

    def fraction(self) -> float:
        here = self._opened.tell() if self._opened and not self._opened.closed else 0
        return (self._bytes_before + here) / self._total_bytes


@dataclass(frozen=True)
class _Record:
    value: object
    where: str
    """Location in the file, for messages."""
    offset: int | None = None
    """Bytes of the file before a paragraph."""


def messages_of(record: object) -> list[dict[str, Any]]:
    """Returns the messages of a record.

    Raises:
        ValueError: It has none, or a message without a role or text.
    """
    messages = record.get(MESSAGES) if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"there is no list of messages in '{MESSAGES}'")
    for number, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise ValueError(f"message {number} has no text as its '{key}'")
    return messages


def _conversation(record: object, where: str) -> str:
    try:
        return json.dumps(messages_of(record), ensure_ascii=False)
    except ValueError as error:
        raise RecipeError(
            f"{where}: {error}.",
            'a conversation is {"messages": [{"role": "user", "content": "…"}, …]}; '
            "for plain text, set data.format=text",
        ) from error


def _text(field: str, record: object, where: str) -> str:
    text = record
    if isinstance(record, dict):
        for key in [field] if field in record else field.split("."):
            text = text.get(key) if isinstance(text, dict) else None
    if not isinstance(text, str):
        raise RecipeError(
            f"{where}: no text in field '{field}'.",
            "set data.text_field to the field that holds the text, or #text=FIELD of this source",
        )
    return text


def _column(field: str, row: dict[str, Any], where: str) -> str:
    if field not in row:
        raise RecipeError(
            f"{where} has no field '{field}'; it has {', '.join(row)}.", "set data.text_field"
        )
    return row[field] or ""


def _paragraphs(file: IO[bytes]) -> Iterator[_Record]:
    """Yields the texts between blank lines."""
    offset, start, lines = 0, 0, list[bytes]()
    for line in file:
        blank = not line.strip()
        if lines and (blank or offset - start > LONGEST_PARAGRAPH):
            yield _Record(_decoded(lines), "", start)
            lines = []
        if not blank:
            start = start if lines else offset
            lines.append(line)
        offset += len(line)
    if lines:
        yield _Record(_decoded(lines), "", start)


def _decoded(lines: list[bytes]) -> str:
    return b"".join(lines).decode("utf-8").replace("\r\n", "\n")


def _json_records(file: Any) -> Iterator[object]:
    first = file.peek(1024).lstrip()[:1]
    if first == b"[":
        yield from ijson.items(file, "item", use_float=True)
    elif first == b"{":
        yield from (value for _, value in ijson.kvitems(file, "", use_float=True))
    else:
        raise ValueError("it is neither a list nor a mapping of records")


def _json_lines(file: Any) -> Iterator[_Record]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            yield _Record(record, f"line {number}")


class _HubReader:
    def __init__(self, hub: HubDataset, revision: str | None, text_of: TextOf, state: Any) -> None:
        from datasets import load_dataset

        self._name, self._text_of = hub.name, text_of
        self._rows = load_dataset(
            hub.name, hub.config, split=hub.split, revision=revision, streaming=True
        )
        if state is not None:
            self._rows.load_state_dict(state)

    def __iter__(self) -> Iterator[Document]:
        for row in self._rows:
            if text := self._text_of(row, f"dataset {self._name}").strip():
                yield Document(text)

    def state(self) -> Any:
        return self._rows.state_dict()

    def fraction(self) -> float:
        return 0.0


def digest(text: str) -> bytes:
    """Returns 16 bytes that identify a document."""
    return hashlib.sha256(text.encode()).digest()[:16]


def draw_of(document: Document, document_digest: bytes) -> float:
    """Returns the number from 0 to below 1 that decides a document's part.

    For a paragraph it is its position: a part is then a few long pieces of a text, and evaluation
    text does not lie between training text. For a record it is its hash, which does not depend on
    the order or a seed.
    """
    if document.position is not None:
        return document.position
    return int.from_bytes(document_digest[:8], "big") / 2**64


def part_of(draw: float, fractions: Mapping[str, float]) -> str:
    """Assigns a draw to a part; training gets the remainder of the fractions."""
    for part, fraction in fractions.items():
        if draw < fraction:
            return part
        draw -= fraction
    return "train"
