"""Streams the documents of a source, and assigns each document to a split."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import IO, Any, Protocol

import ijson

from recipes.core.errors import RecipeError
from recipes.data.records import (
    MESSAGES,
    READERS,
    TOOLS,
    HasToolsError,
    Record,
    dialogue_text,
    messages_of,
    parquet_rows,
    text_of_fields,
)
from recipes.data.sources import DIALOGUE, HubDataset, Source, TextFile, files_of, parse_source

SPLITS = ("train", "validation", "calibration", "heldout")
"""Names of the splits, and of their files."""
TOKEN_BYTES = 4
"""Bytes of a token in the ``.bin`` files of splits that ``prepare_data`` tokenizes."""
RECORD_TYPES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
"""Types of files that may hold conversations."""
STRETCH_BYTES = 4 << 20
"""Approximate bytes of a stretch, which is a contiguous section of a source's text. Within each
stretch, every split is one range of consecutive paragraphs. So every split has text from the whole
source."""
LIMITED_STRETCHES = 8
"""Approximate minimum number of stretches that are read if a limit truncates the source. A single
truncated stretch might lack training text, which is last in each stretch."""
_JSON_LINES_FIX = ", or name the file .jsonl if each line is a record"
"""Part of the fix in errors about ``.json`` files."""
LEFT_OUT = "left out"
"""If a record is no usable conversation, its text is the JSON ``{LEFT_OUT: reason}``."""
NOT_A_CONVERSATION, HAS_TOOLS = "not a conversation", "has tools"
"""Reasons to leave a record out. They name the counts in reports."""
TextOf = Callable[[Any, str], str]
"""Function that returns the text of a record. Arguments: record, and its location for errors."""
_HUB_ERRORS = (OSError, RuntimeError, ValueError)
"""Errors of ``datasets``: of the network, of access, of names and of damaged files."""
_HUB_FIX = "correct the split or config of the source, or check the network and HF_TOKEN"
_FORMAT_ERRORS = (EOFError, ValueError, OverflowError, zlib.error, csv.Error, ijson.JSONError)
_WHEEL_ERRORS = (zipfile.BadZipFile, RuntimeError)  # the wheel is damaged, encrypted or too new
_UNREADABLE_FILE_ERRORS = (OSError, *_FORMAT_ERRORS, *_WHEEL_ERRORS)


@dataclass(frozen=True)
class Document:
    """A document of a source."""

    text: str
    """The text, the JSON of a conversation's messages, or the JSON ``{LEFT_OUT: reason}``."""
    position_in_stretch: float | None = None
    """Start of a paragraph as a fraction of its stretch (see ``STRETCH_BYTES``), in [0, 1).
    ``None`` for other records, because consecutive records may be unrelated."""


class Reader(Protocol):
    """Iterates over a source's documents, or over those after an earlier reader's ``state``."""

    def __iter__(self) -> Iterator[Document]:
        """Yields all documents, or those after the last one of the earlier reader."""

    def state(self) -> Any:
        """Returns JSON values with which a later reader resumes after the last yielded document."""

    def fraction(self) -> float:
        """Returns the fraction of the source that was read; 0 if its size is unknown."""


def read_source(
    source: str,
    text_field: str,
    state: Any = None,
    *,
    chat: bool = False,
    leave_out: bool = False,
    limit_bytes: float = math.inf,
) -> Reader:
    """Opens a source of ``data.sources``.

    In text files, blank lines separate documents. JSON files hold a list of records, or a mapping
    to records. JSONL files have one record per line, tables one per row. A Markdown,
    reStructuredText or Python file is one document. A record is a string, a conversation, or a
    mapping.

    Args:
        source: A source with its options.
        text_field: Field with the text of a mapping, unless the source has the option ``text``.
        state: State of an earlier reader, to resume after its last document.
        chat: Whether all records must be conversations.
        leave_out: Whether a record that is no usable conversation becomes a document with
            the text ``{LEFT_OUT: reason}``. If not, an error is raised.
        limit_bytes: Approximate number of bytes that the caller will read. If the source has more,
            stretches are shorter, so that ``LIMITED_STRETCHES`` of them are read.
    """
    parsed = parse_source(source)
    columns = {MESSAGES, TOOLS}  # of a table; its other columns are not read
    if chat:
        text_of: TextOf = _conversation_or_reason if leave_out else _conversation
    elif parsed.format == DIALOGUE:
        text_of = _dialogue
    else:
        fields = parsed.text or text_field
        text_of, columns = partial(_text, fields), _columns(fields)
    if parsed.hub:
        return _HubReader(parsed.hub, parsed.revision, columns, text_of, state)
    return _FileReader(parsed, columns, text_of, state, limit_bytes)


class _FileReader:
    """Reads files. The state is the index of a file and the number of records read from it."""

    def __init__(
        self,
        source: Source,
        columns: set[str],
        text_of: TextOf,
        state: Sequence[int] | None,
        limit_bytes: float,
    ) -> None:
        self._source, self._columns, self._text_of = source, columns, text_of
        self._file_index, self._records_to_skip = state or (0, 0)
        self._files = files_of(source)
        self._total_bytes = max(1, sum(file.size for file in self._files))
        stretch_bytes: float = STRETCH_BYTES
        if limit_bytes < self._total_bytes:
            stretch_bytes = min(STRETCH_BYTES, limit_bytes / LIMITED_STRETCHES)
        self._number_of_stretches = max(1, round(self._total_bytes / stretch_bytes))
        # Bytes of the files before the open one.
        self._bytes_before = sum(file.size for file in self._files[: self._file_index])
        self._records_read = 0  # from the open file
        self._open_file: IO[bytes] | None = None

    def __iter__(self) -> Iterator[Document]:
        for index in range(self._file_index, len(self._files)):
            file = self._files[index]
            self._file_index, self._records_read = index, 0
            for record in self._read(file):
                self._require_record(file, record)
                self._records_read += 1
                if self._records_read <= self._records_to_skip:
                    continue
                text = self._text_of(record.value, f"{file.name}, {record.where}").strip()
                # JSON may contain half of a surrogate pair, which tokenizers refuse.
                if text := text.encode("utf-8", "replace").decode():  # writes "?" instead
                    yield Document(text, self._position_in_stretch(record.offset))
            self._records_to_skip = 0
            self._bytes_before += file.size
            self._open_file = None

    def _read(self, file: TextFile) -> Iterator[Record]:
        file_type = self._source.file_type or ""
        read = READERS[file_type]
        if read is parquet_rows:  # the only type whose columns can be skipped
            read = partial(parquet_rows, columns=self._columns)
        try:
            with file.open() as self._open_file:
                yield from read(self._open_file)
        except _UNREADABLE_FILE_ERRORS as error:
            json_lines_fix = _JSON_LINES_FIX if file_type == ".json" else ""
            raise RecipeError(
                f"{file.name} cannot be read as {file_type}: {error}",
                f"correct the file{json_lines_fix}, or leave it out",
            ) from error

    def _require_record(self, file: TextFile, record: Record) -> None:
        """Checks that a JSON mapping maps names to records, and is not itself a single record.

        Raises:
            RecipeError: A value of the mapping is neither a mapping nor a string, or is a string
                whose key is the name of a field to read.
        """
        if record.key is None or isinstance(record.value, dict):
            return
        if record.key in self._columns or not isinstance(record.value, str):
            raise RecipeError(
                f"{file.name} cannot be read as .json: '{record.key}' is a field of a record, not "
                "the name of a record.",
                f"put the record into a list, [{{…}}]{_JSON_LINES_FIX}",
            )

    def _position_in_stretch(self, offset: int | None) -> float | None:
        """Returns ``Document.position_in_stretch`` of a record at ``offset`` of the open file."""
        if offset is None:
            return None
        stretches = (self._bytes_before + offset) * self._number_of_stretches / self._total_bytes
        return stretches % 1  # without the number of whole stretches before the record

    def state(self) -> list[int]:
        return [self._file_index, self._records_read]

    def fraction(self) -> float:
        file = self._open_file
        offset = file.tell() if file and not file.closed else 0
        return (self._bytes_before + offset) / self._total_bytes


def _conversation(record: object, where: str) -> str:
    try:
        # Messages may have other keys with values that are not JSON, such as times.
        return json.dumps(messages_of(record), ensure_ascii=False, default=str)
    except ValueError as error:
        raise RecipeError(
            f"{where}: {error}.",
            'a conversation is {"messages": [{"role": "user", "content": "…"}, …]}; '
            "for plain text, set data.format=text",
        ) from error


def _conversation_or_reason(record: object, where: str) -> str:
    """Returns a conversation, or the reason to leave the record out, as JSON."""
    try:
        return _conversation(record, where)
    except RecipeError as error:
        has_tools = isinstance(error.__cause__, HasToolsError)
        return json.dumps({LEFT_OUT: HAS_TOOLS if has_tools else NOT_A_CONVERSATION})


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
        items = record.items() if isinstance(record, dict) else ()
        names = ", ".join(f"{name} ({type(value).__name__})" for name, value in items)
        has_names = f"; it has {names}" if names else ""
        raise RecipeError(
            f"{where}: no text in field '{fields}'{has_names}.",
            "set data.text_field to the field that holds the text, or #text=FIELD of this source",
        )
    return text


def _columns(fields: str) -> set[str]:
    """Returns the columns that may hold fields: ``a.b`` is a column, or a field of column ``a``."""
    names = fields.split(",")
    return {*names, *(name.split(".")[0] for name in names)}


class _HubReader:
    """Streams a dataset of the Hugging Face hub. The state is the dataset's ``state_dict``."""

    def __init__(
        self, hub: HubDataset, revision: str | None, columns: set[str], text_of: TextOf, state: Any
    ) -> None:
        from datasets import load_dataset

        self._name, self._text_of = hub.name, text_of
        try:
            self._rows = load_dataset(
                hub.name, hub.config, split=hub.split, revision=revision, streaming=True
            )
        except _HUB_ERRORS as error:  # a ValueError lists the available splits or configs
            raise RecipeError(
                f"split {hub.split} of dataset {hub.name} cannot be read: {error}", _HUB_FIX
            ) from error
        # Reading fewer columns is faster. ``column_names`` is known for Parquet files, the usual
        # format on the hub, and may be ``None`` for others.
        known_columns = self._rows.column_names or []
        if columns_to_read := [name for name in known_columns if name in columns]:
            self._rows = self._rows.select_columns(columns_to_read)
        if state is not None:
            self._rows.load_state_dict(state)

    def __iter__(self) -> Iterator[Document]:
        rows = iter(self._rows)
        while (row := self._next_row(rows)) is not None:
            if text := self._text_of(row, f"dataset {self._name}").strip():
                yield Document(text)

    def _next_row(self, rows: Iterator[Any]) -> Any:
        """Returns the next row; ``None`` at the end."""
        try:
            return next(rows, None)
        except TypeError as error:  # ``datasets`` expects the first file's columns in all files
            what = f"the files of dataset {self._name} have columns of different types: {error}"
            fix = "download its files, and use them as sources: FOLDER/*.parquet"
            raise RecipeError(what, fix) from error
        except _HUB_ERRORS as error:
            what = f"dataset {self._name} cannot be read: {error}"
            raise RecipeError(what, f"{_HUB_FIX}; the same command resumes") from error

    def state(self) -> Any:
        return self._rows.state_dict()

    def fraction(self) -> float:
        return 0.0  # the size of the dataset is not known


def digest(text: str, *, chat: bool = False) -> bytes:
    """Returns 16 bytes that identify a document by its text.

    With ``chat``, the text is the JSON of messages, and only roles and contents count.
    """
    if chat:
        messages = [{key: m[key] for key in ("role", "content")} for m in json.loads(text)]
        text = json.dumps(messages, ensure_ascii=False)
    return hashlib.sha256(text.encode()).digest()[:16]


def split_digest(text: str, *, chat: bool = False) -> bytes:
    """Returns the digest that decides a document's split.

    Conversations with the same question have the same digest, whatever the answers, so a question
    of held-out text is never trained on. The question is all that precedes the first answer. If it
    has no message of the user, the whole conversation decides.
    """
    if chat:
        question = list(takewhile(lambda m: m["role"] != "assistant", json.loads(text)))
        if any(message["role"] == "user" for message in question):
            text = json.dumps(question)
    return digest(text, chat=chat)


def split_number(document: Document, document_digest: bytes) -> float:
    """Returns a number in [0, 1) that decides a document's split.

    For a paragraph, the number is its position in its stretch. So consecutive paragraphs are mostly
    in the same split, and evaluation text is not scattered among training text. For other records,
    the number is derived from ``split_digest``, so it does not depend on their order or a seed.
    """
    if document.position_in_stretch is not None:
        return document.position_in_stretch
    return int.from_bytes(document_digest[:8], "big") / 2**64


def split_of(number: float, fractions: Mapping[str, float]) -> str:
    """Returns the split of a document whose ``split_number`` is ``number``.

    The splits of ``fractions`` take consecutive ranges of numbers from 0, and ``train`` takes the
    remainder.
    """
    for split, fraction in fractions.items():
        if number < fraction:
            return split
        number -= fraction
    return "train"
