"""Streams the documents of a source, and assigns each document to a split."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import IO, Any, Protocol

import ijson

from recipes.core.errors import RecipeError
from recipes.data.records import (
    MESSAGES,
    READERS,
    TOOLS,
    Record,
    dialogue_text,
    messages_of,
    text_of_fields,
)
from recipes.data.sources import DIALOGUE, HubDataset, Source, TextFile, files_of, parse_source

SPLITS = ("train", "validation", "calibration", "heldout")
TOKEN_BYTES = 4
"""Bytes of a token in the ``.bin`` files of splits that ``prepare_data`` tokenizes."""
RECORD_TYPES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
CHECKED_CONVERSATIONS = 100
"""Number of conversations of a source that ``conversation_problem`` reads."""
STRETCH_BYTES = 4 << 20
"""Approximate bytes of a stretch. A text is cut into stretches, so that each split is spread over
the text. The paragraphs of a stretch are divided into one contiguous part for each split."""
LIMITED_STRETCHES = 8
"""Approximate minimum of stretches to read of a text that a limit truncates. The training text is
last in a stretch, so a part of a single stretch might not have any."""
JSON_LINES = ", or name the file .jsonl if each line is a record"
"""Part of a fix for a JSON file."""
TextOf = Callable[[Any, str], str]
"""A function of a record and its location (for error messages) that returns a document's text."""
_UNREADABLE = (
    *(OSError, EOFError, ValueError, zlib.error, csv.Error, ijson.JSONError),
    *(zipfile.BadZipFile, RuntimeError),  # damaged, encrypted, or an unknown compression
)


@dataclass(frozen=True)
class Document:
    """A text and, for a paragraph, where it starts in its stretch (see ``STRETCH_BYTES``)."""

    text: str
    """The text, or the JSON of a conversation's messages."""
    position_in_stretch: float | None = None
    """Start of a paragraph as a fraction of its stretch, in [0, 1). ``None`` for other records,
    because consecutive records may be unrelated."""


class Reader(Protocol):
    """Iterates over the documents of a source. A later reader can resume at the saved state."""

    def __iter__(self) -> Iterator[Document]:
        """Yields the documents after the state with which the reader was opened, or all."""

    def state(self) -> Any:
        """Returns where a later reader resumes, as JSON values: after the last yielded document."""

    def fraction(self) -> float:
        """Returns the fraction of the source that was read; 0 if its size is unknown."""


def read_source(
    source: str,
    text_field: str,
    state: Any = None,
    *,
    chat: bool = False,
    limit_bytes: float = math.inf,
) -> Reader:
    """Opens a source of ``data.sources``, at the ``state`` of an earlier reader if given.

    In text files, blank lines separate documents. JSON files hold a list of records, or a mapping
    to records. JSONL files have one record per line, tables one per row. A Markdown,
    reStructuredText or Python file is one document. A record is a string, a conversation, or a
    mapping. The text of a mapping is in ``text_field``, or in the fields of the option ``text``.
    With ``chat``, all records must be conversations. ``limit_bytes`` is about how many bytes the
    caller will read; see ``LIMITED_STRETCHES``.
    """
    parsed = parse_source(source)
    field_text = partial(_text, parsed.text or text_field)
    plain_text = _dialogue if parsed.format == DIALOGUE else field_text
    text_of = _conversation if chat else plain_text
    of_text = {c for name in (parsed.text or text_field).split(",") for c in _columns(name)}
    columns = of_text if text_of is field_text else {MESSAGES, TOOLS}
    if parsed.hub:
        return _HubReader(parsed.hub, parsed.revision, columns, text_of, state)
    return _FileReader(parsed, columns, text_of, state, limit_bytes)


def conversation_problem(source: str) -> tuple[str, str] | None:
    """Checks the file type of chats or dialogues, and the first conversations of a local file.

    Returns what is wrong and the fix, if any.
    """
    parsed = parse_source(source)
    if parsed.prompts:
        return conversation_problem(parsed.prompts)
    if parsed.hub or parsed.by_teacher:
        return None
    if parsed.file_type not in RECORD_TYPES:
        types = " or ".join(RECORD_TYPES)
        fix = f"give {types}; for plain text, leave out #format and set data.format=text"
        return f"'{parsed.path}' has no conversations", fix
    if parsed.wheel or not parsed.local_files():
        return None
    try:
        chat = parsed.format != DIALOGUE
        for _ in islice(read_source(source, "", chat=chat), CHECKED_CONVERSATIONS):
            pass
    except RecipeError as error:
        return error.what, error.fix
    return None


class _FileReader:
    """Reads files. The state is the number of records read; a resumed reader skips so many."""

    def __init__(
        self,
        source: Source,
        columns: set[str],
        text_of: TextOf,
        state: int | None,
        limit_bytes: float,
    ) -> None:
        self._source, self._columns, self._text_of = source, columns, text_of
        self._skip = state or 0
        self._files = files_of(source)
        self._total_bytes = max(1, sum(file.size for file in self._files))
        limited = limit_bytes if limit_bytes < self._total_bytes else math.inf
        stretch_bytes = min(STRETCH_BYTES, limited / LIMITED_STRETCHES)
        self._stretches = max(1, round(self._total_bytes / stretch_bytes))
        self._bytes_before, self._records = 0, 0
        self._opened: IO[bytes] | None = None

    def __iter__(self) -> Iterator[Document]:
        for file in self._files:
            for record in self._read(file):
                self._require_record(file, record)
                self._records += 1
                if self._records <= self._skip:
                    continue
                text = self._text_of(record.value, f"{file.name}, {record.where}").strip()
                # JSON may contain half of a surrogate pair, which tokenizers refuse.
                if text := text.encode("utf-8", "replace").decode():
                    yield Document(text, self._position_in_stretch(record.offset))
            self._bytes_before, self._opened = self._bytes_before + file.size, None

    def _read(self, file: TextFile) -> Iterator[Record]:
        file_type = self._source.file_type or ""
        try:
            with file.open() as self._opened:
                yield from READERS[file_type](self._opened)
        except _UNREADABLE as error:
            raise RecipeError(
                f"{file.name} cannot be read as {file_type}: {error}",
                f"correct the file{JSON_LINES if file_type == '.json' else ''}, or leave it out",
            ) from error

    def _require_record(self, file: TextFile, record: Record) -> None:
        """Checks that an entry of a JSON mapping is a record, not a field of a single record."""
        if record.key is None or isinstance(record.value, dict):
            return
        if record.key in self._columns or not isinstance(record.value, str):
            raise RecipeError(
                f"{file.name} cannot be read as .json: '{record.key}' is a field of a record, not "
                "a name of one.",
                f"put the record into a list, [{{…}}]{JSON_LINES}",
            )

    def _position_in_stretch(self, offset: int | None) -> float | None:
        """Returns the position of a paragraph of the open file; ``None`` for other records."""
        if offset is None:
            return None
        return (self._bytes_before + offset) * self._stretches / self._total_bytes % 1

    def state(self) -> int:
        return self._records

    def fraction(self) -> float:
        offset = self._opened.tell() if self._opened and not self._opened.closed else 0
        return (self._bytes_before + offset) / self._total_bytes


def _conversation(record: object, where: str) -> str:
    try:
        return json.dumps(messages_of(record), ensure_ascii=False)
    except ValueError as error:
        raise RecipeError(
            f"{where}: {error}.",
            'a conversation is {"messages": [{"role": "user", "content": "…"}, …]}; '
            "for plain text, set data.format=text",
        ) from error


def _dialogue(record: object, where: str) -> str:
    try:
        return dialogue_text(record)
    except ValueError as error:
        raise RecipeError(
            f"{where}: {error}.",
            'a dialogue is {"messages": [{"sender": "…", "text": "…"}, …]} between two people; '
            "for other text, leave #format=dialogue out",
        ) from error


def _text(fields: str, record: object, where: str) -> str:
    text = text_of_fields(fields, record)
    if text is None:
        names = f"; it has {', '.join(record)}" if isinstance(record, dict) else ""
        raise RecipeError(
            f"{where}: no text in field '{fields}'{names}.",
            "set data.text_field to the field that holds the text, or #text=FIELD of this source",
        )
    return text


def _columns(field_name: str) -> tuple[str, str]:
    """Returns the columns that may hold a field: ``a.b`` is a column, or a field of ``a``."""
    return field_name, field_name.split(".")[0]


class _HubReader:
    """Reads a dataset of the Hugging Face hub. The state is that of the library ``datasets``."""

    def __init__(
        self, hub: HubDataset, revision: str | None, columns: set[str], text_of: TextOf, state: Any
    ) -> None:
        from datasets import load_dataset

        self._name, self._text_of = hub.name, text_of
        self._rows = load_dataset(
            hub.name, hub.config, split=hub.split, revision=revision, streaming=True
        )
        # Each column takes time per row. The names are known for Parquet, which hubs usually have.
        if chosen := [name for name in self._rows.column_names or [] if name in columns]:
            self._rows = self._rows.select_columns(chosen)
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


def digest(text: str, *, chat: bool = False) -> bytes:
    """Returns 16 bytes that identify a document; in a chat, only roles and contents count."""
    if chat:
        messages = [{key: m[key] for key in ("role", "content")} for m in json.loads(text)]
        text = json.dumps(messages, ensure_ascii=False)
    return hashlib.sha256(text.encode()).digest()[:16]


def split_number(document: Document, document_digest: bytes) -> float:
    """Returns a number in [0, 1) that decides a document's split.

    For a paragraph, the number is its position in its stretch. So consecutive paragraphs are mostly
    in the same split, and evaluation text is not scattered among training text. For other records,
    the number is a hash of the text, which does not depend on order or a seed.
    """
    if document.position_in_stretch is not None:
        return document.position_in_stretch
    return int.from_bytes(document_digest[:8], "big") / 2**64


def split_of(number: float, fractions: Mapping[str, float]) -> str:
    """Returns the split of a document with a given ``split_number``.

    The splits of ``fractions`` take consecutive ranges from 0. ``train`` has the rest.
    """
    for split, fraction in fractions.items():
        if number < fraction:
            return split
        number -= fraction
    return "train"
