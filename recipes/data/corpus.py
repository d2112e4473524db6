"""Documents of a source one after the other, however large it is, and the part each belongs to."""

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
"""Bytes after which a text without blank lines is cut all the same, at the end of a line."""
RECORD_TYPES = (".jsonl", ".jsonl.gz", ".json")
MESSAGES = "messages"
"""Of a record: ``{"messages": [{"role": "user", "content": "…"}, …]}``."""
LOOKED_AT = 100
"""Conversations that a check reads."""
STRETCH = 4 << 20
"""Bytes of running text, about, that are divided among the parts; shorter texts as a whole."""
Take = Callable[[Any, str], str]
"""Makes a document's text of a record, given where that is."""
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ijson.JSONError)


@dataclass(frozen=True)
class Document:
    """A text, and where it lies."""

    text: str
    """Of a conversation, the JSON of its messages."""
    place: float | None = None
    """Of a paragraph: how far into its stretch of the source it begins, from 0 to below 1. Records
    have none, since they are not known to belong together."""


class Reader(Protocol):
    """Documents of a source, which can stop and be taken up again."""

    def __iter__(self) -> Iterator[Document]:
        """Those that an earlier reader of this source had not come to."""

    def state(self) -> Any:
        """What a later reader needs to go on after the last document, as JSON can hold it."""

    def share(self) -> float:
        """Share of the source that has been read; 0 where its size is not known."""


def read_source(source: str, text_field: str, state: Any = None, *, chat: bool = False) -> Reader:
    """Opens a source as in ``data.sources``, at the ``state`` of an earlier reader if given.

    Text files hold documents separated by blank lines; JSON files a list of records or a mapping to
    records; JSONL a record a line. A record is a string or has the text in ``text_field``, or in
    ``a.b`` of nested ones, unless the source names a field of its own; or it is a conversation.
    Refuses what is not there, and while reading what is not as its name says.
    """
    parsed = parse_source(source)
    of_text = partial(_column if parsed.hub else _text, parsed.text or text_field)
    take = _conversation if chat else of_text
    if parsed.hub:
        return _HubReader(parsed.hub, parsed.revision, take, state)
    return _FileReader(parsed, take, state)


def chat_problem(source: str) -> tuple[str, str] | None:
    """What is wrong with the beginning of a source of conversations, and how to mend it.

    Only of a file that is here: it is what a check can read in no time.
    """
    parsed = parse_source(source)
    if parsed.prompts:
        return chat_problem(parsed.prompts)
    if parsed.hub or parsed.wheel or not parsed.local_files():
        return None
    if parsed.file_type not in RECORD_TYPES:
        return f"'{parsed.path}' is not of conversations", f"give {' or '.join(RECORD_TYPES)}"
    try:
        for _ in islice(read_source(source, "", chat=True), LOOKED_AT):
            pass
    except RecipeError as error:
        return error.what, error.fix
    return None


class _FileReader:
    def __init__(self, source: Source, take: Take, state: int | None) -> None:
        self._source, self._take, self._before = source, take, state or 0
        self._files = files_of(source)
        self._total = max(1, sum(file.size for file in self._files))
        self._passed, self._records = 0, 0
        self._open: IO[bytes] | None = None

    def __iter__(self) -> Iterator[Document]:
        for file in self._files:
            with file.open() as self._open:
                for read in self._read(file, self._open):
                    self._records += 1
                    if self._records > self._before:
                        text = self._take(read.record, f"{file.name}, {read.where}").strip()
                        if text:
                            yield Document(text, self._place(read.offset))
            self._passed, self._open = self._passed + file.size, None

    def _read(self, file: TextFile, opened: IO[bytes]) -> Iterator[_Record]:
        kind = self._source.file_type
        try:
            if kind == ".txt":
                yield from _paragraphs(opened)
            elif kind == ".json":
                for number, record in enumerate(_json_records(opened), 1):
                    yield _Record(record, f"record {number}")
            else:
                yield from _json_lines(
                    gzip.GzipFile(fileobj=opened) if kind == ".jsonl.gz" else opened
                )
        except _UNREADABLE as error:
            raise RecipeError(
                f"{file.name} cannot be read as {kind}: {error}", "mend the file, or leave it out"
            ) from error

    def _place(self, offset: int | None) -> float | None:
        if offset is None:
            return None
        stretches = max(1, round(self._total / STRETCH))
        return (self._passed + offset) * stretches / self._total % 1

    def state(self) -> int:
        return self._records

    def share(self) -> float:
        here = self._open.tell() if self._open and not self._open.closed else 0
        return (self._passed + here) / self._total


@dataclass(frozen=True)
class _Record:
    record: object
    where: str
    """In its file."""
    offset: int | None = None
    """Bytes before a paragraph."""


def messages_of(record: object) -> list[dict[str, Any]]:
    """The messages of a record.

    Raises:
        ValueError: It has none, or one of them is not a role's text.
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
        text = record[field] if field in record else _nested(record, field.split("."))
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


def _nested(record: object, keys: list[str]) -> object:
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _paragraphs(file: IO[bytes]) -> Iterator[_Record]:
    """Texts between blank lines."""
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
    def __init__(self, hub: HubDataset, revision: str | None, take: Take, state: Any) -> None:
        from datasets import load_dataset

        self._name, self._take = hub.name, take
        self._rows = load_dataset(
            hub.name, hub.config, split=hub.split, revision=revision, streaming=True
        )
        if state is not None:
            self._rows.load_state_dict(state)

    def __iter__(self) -> Iterator[Document]:
        for row in self._rows:
            if text := self._take(row, f"dataset {self._name}").strip():
                yield Document(text)

    def state(self) -> Any:
        return self._rows.state_dict()

    def share(self) -> float:
        return 0.0


def digest(text: str) -> bytes:
    """16 bytes that a document is known by."""
    return hashlib.sha256(text.encode()).digest()[:16]


def draw_of(document: Document, known_as: bytes) -> float:
    """What decides a document's part, from 0 to below 1.

    A paragraph's is its place, so that a part is a few long pieces of a text and what is measured
    on does not stand between what was trained on. Of records it is their hash, so that no order or
    seed can move them.
    """
    if document.place is not None:
        return document.place
    return int.from_bytes(known_as[:8], "big") / 2**64


def part_of(draw: float, fractions: Mapping[str, float]) -> str:
    """Assigns a draw to a part; what the fractions leave is for training."""
    for part, fraction in fractions.items():
        if draw < fraction:
            return part
        draw -= fraction
    return "train"
