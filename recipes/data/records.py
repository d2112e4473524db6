"""Reads the records of files, with one function per file type (``READERS``)."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import IO, Any

import ijson

LONGEST_PARAGRAPH = 1 << 14
"""Bytes after which a paragraph ends at the next line, even without a blank line. Paragraphs are
assigned to splits as a whole, so they must be small compared to a source."""
LONGEST_FIELD = 1 << 27
"""Largest number of characters in a field of a table."""
BUFFER_BYTES = 1 << 20
"""Bytes of a decompressed file that are buffered at a time."""
PARQUET_ROWS = 1024
"""Rows of a Parquet file that are read at once."""
MESSAGES = "messages"
"""Field of a conversation: ``{"messages": [{"role": "user", "content": "…"}, …]}``."""
TOOLS = "tools"
"""Field of a conversation with the definitions of tools, which are not supported."""
SPEAKERS = {"user": "A", "assistant": "B"}
"""Labels of the two speakers in ``dialogue_text``, by their roles in a conversation."""


class HasToolsError(ValueError):
    """A conversation has tools or tool calls, which are not supported."""


@dataclass(frozen=True)
class Record:
    """A record of a file."""

    value: object
    """A mapping, a string, or another JSON value."""
    where: str
    """Location in the file, for error messages, such as ``line 3``; empty for a paragraph."""
    offset: int | None = None
    """Position of a paragraph's first byte in the file; ``None`` for other records."""
    key: str | None = None
    """Key of a record in a JSON mapping; ``None`` for other records."""


def _paragraphs(file: IO[bytes]) -> Iterator[Record]:
    """Yields the paragraphs of a text, which are separated by blank lines."""
    lines = list[bytes]()  # of the current paragraph
    paragraph_start = line_start = 0  # positions of their first bytes in the file
    for line in file:
        blank = not line.strip()
        if lines and (blank or line_start - paragraph_start > LONGEST_PARAGRAPH):
            yield Record(_decode(b"".join(lines)), where="", offset=paragraph_start)
            lines = []
        if not blank:
            if not lines:
                paragraph_start = line_start
            lines.append(line)
        line_start += len(line)
    if lines:
        yield Record(_decode(b"".join(lines)), where="", offset=paragraph_start)


def _decode(text: bytes) -> str:
    return text.decode("utf-8-sig").replace("\r\n", "\n")  # without a byte-order mark


def _whole_file(file: IO[bytes]) -> Iterator[Record]:
    yield Record(_decode(file.read()), "the file")


def _json_records(file: Any) -> Iterator[Record]:
    """Yields the items of a JSON list, or the values of a JSON mapping with their keys."""
    if file.peek(1024).startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))  # skips the byte-order mark
    first_character = file.peek(1024).lstrip()[:1]
    # For ``ijson``, "item" selects the items of the outer list, and "" selects the outer mapping.
    # Without ``use_float``, numbers would be ``Decimal``.
    if first_character == b"[":
        items = ((None, value) for value in ijson.items(file, "item", use_float=True))
    elif first_character == b"{":
        items = ijson.kvitems(file, "", use_float=True)
    else:
        raise ValueError("it is neither a list nor a mapping of records")
    for number, (key, value) in enumerate(items, 1):
        yield Record(value, f"record {number}", key=key)


def _json_lines(file: Any) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            yield Record(record, f"line {number}")


def _gzipped_lines(file: IO[bytes]) -> Iterator[Record]:
    yield from _json_lines(gzip.GzipFile(fileobj=file))


def _zstd_lines(file: IO[bytes]) -> Iterator[Record]:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
    yield from _json_lines(io.BufferedReader(stream, BUFFER_BYTES))


def parquet_rows(file: IO[bytes], columns: Collection[str] = ()) -> Iterator[Record]:
    """Yields a table's rows. Reads only ``columns``; if the table has none of them, all columns."""
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    columns_to_read = [name for name in table.schema_arrow.names if name in columns] or None
    batches = table.iter_batches(PARQUET_ROWS, columns=columns_to_read)
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows, 1):
        yield Record(row, f"row {number}")


def _table_rows(delimiter: str, file: IO[bytes]) -> Iterator[Record]:
    """Yields the rows of a table whose first line names the columns.

    Raises:
        ValueError: A row does not have one cell per column. Or the delimiter is a tab, and a cell
            contains a tab or a line break.
    """
    csv.field_size_limit(LONGEST_FIELD)
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    columns = next(rows, [])
    for number, row in enumerate(filter(None, rows), 1):  # without blank lines
        if len(row) != len(columns):
            raise ValueError(
                f"row {number} has {len(row)} cells, "
                f"but the first line names {len(columns)} columns"
            )
        # In many .tsv files, a quotation mark is an ordinary character. Then ``csv`` joins all rows
        # between two such marks into one cell.
        if delimiter == "\t" and any(mark in cell for cell in row for mark in "\t\n\r"):
            raise ValueError(
                f"row {number}, up to line {rows.line_num}, has a tab or a line break in quotes; "
                "if a cell starts with a quotation mark, quote the cell and double its marks "
                '("""Yes"" …"), or save the table as .csv'
            )
        yield Record(dict(zip(columns, row, strict=True)), f"row {number}")


READERS: dict[str, Callable[[IO[bytes]], Iterator[Record]]] = {
    ".txt": _paragraphs,
    ".json": _json_records,
    ".jsonl": _json_lines,
    ".jsonl.gz": _gzipped_lines,
    ".jsonl.zst": _zstd_lines,
    ".parquet": parquet_rows,
    ".csv": partial(_table_rows, ","),
    ".tab": partial(_table_rows, "\t"),
    ".tsv": partial(_table_rows, "\t"),
    ".md": _whole_file,
    ".rst": _whole_file,
    ".py": _whole_file,
}
"""Function that yields the records of an open file, by the suffix of the file's name."""
ONE_DOCUMENT_FILES = tuple(suffix for suffix, read in READERS.items() if read is _whole_file)
"""Suffixes of files with one document each."""
FILES_WITH_FIELDS = tuple(
    suffix for suffix, read in READERS.items() if read not in (_paragraphs, _whole_file)
)
"""Suffixes of files whose records can have fields."""


def text_of_fields(fields: str, record: object) -> str | None:
    """Returns the text in fields of a record, joined by line breaks.

    Returns ``None`` if the record has none of the fields, or if the value of a field is not text.
    Text is a string or a list of strings (joined by line breaks). Null values are skipped.

    Args:
        fields: Names of fields, joined by commas; ``a.b`` is the field ``b`` of the field ``a``.
        record: A mapping; or a string, which is returned unchanged.
    """
    if not isinstance(record, dict):
        return record if isinstance(record, str) else None
    values = [value for name in fields.split(",") for value in _values(name, record)]
    texts: list[Any] = [_text(value) for value in values if value is not None]  # None: not text
    return "\n".join(texts) if values and None not in texts else None


def _values(name: str, record: Any) -> list[Any]:
    """Returns a list with a field's value, or an empty list if the record lacks the field."""
    # A name with a dot may itself be a key. Otherwise it is a path of nested keys.
    keys = [name] if name in record else name.split(".")
    for key in keys:
        if not isinstance(record, dict) or key not in record:
            return []
        record = record[key]
    return [record]


def _text(value: Any) -> str | None:
    """Returns a string, or the joined lines of a list of strings; ``None`` for other values."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None


def messages_of(record: object) -> list[dict[str, Any]]:
    """Returns the messages of a conversation, each with ``role`` and ``content``.

    A record may also be a dialogue, whose messages have ``sender`` and ``text``. The list of a
    dialogue's messages may contain lists of messages. The first speaker becomes the user, the
    second the assistant.

    Raises:
        HasToolsError: The record has tools or tool calls.
        ValueError: There are no messages; a message has no role, sender or text; or more than two
            people speak.
    """
    record = record if isinstance(record, dict) else {}
    messages = record.get(MESSAGES)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"there is no list of messages in '{MESSAGES}'")
    lists = (item if isinstance(item, list) else [item] for item in messages)
    flat_messages = list(chain.from_iterable(lists))
    if all(isinstance(m, dict) and {"sender", "text"} <= m.keys() for m in flat_messages):
        return _messages_of_dialogue(flat_messages)
    has_tools = record.get(TOOLS) not in ("", "[]", None, [], {})  # "[]" is JSON without tools
    has_tool_calls = any(isinstance(m, dict) and m.get("tool_calls") for m in messages)
    if has_tools or has_tool_calls:
        raise HasToolsError("it has tools or tool calls, which are not supported; leave it out")
    for number, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise ValueError(f"message {number} has no text as its '{key}'")
    # In a Parquet file, every message has the keys of all messages, some with null values.
    # Templates fail on a null or an empty list of tool calls.
    return [
        {key: value for key, value in message.items() if value not in (None, [], {})}
        for message in messages
    ]


def _messages_of_dialogue(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replaces senders by roles, and joins consecutive messages of a sender by line breaks."""
    allowed_types = (("sender", (str, int), "str or int"), ("text", (str,), "str"))
    for number, message in enumerate(messages, 1):
        for key, types, type_names in allowed_types:
            if not isinstance(message[key], types):
                what = f"'{key}' of message {number} is {message[key]!r}, not {type_names}"
                raise ValueError(what)
    # The different senders, in the order of their first messages.
    senders = dict.fromkeys(message["sender"] for message in messages)
    if len(senders) > len(SPEAKERS):
        raise ValueError(f"{len(senders)} people speak, not two")
    # The keys of ``SPEAKERS`` are roles. There may be only one sender.
    roles = dict(zip(senders, SPEAKERS, strict=False))
    return [
        {"role": roles[sender], "content": "\n".join(message["text"] for message in turn)}
        for sender, turn in groupby(messages, key=lambda message: message["sender"])
    ]


def dialogue_text(record: object) -> str:
    """Returns a conversation as plain text, one line per message.

    Raises ``ValueError`` if ``messages_of`` does.
    """
    messages = messages_of(record)
    if len(messages) == 1:  # no dialogue; readers skip an empty text
        return ""
    lines = []
    for message in messages:
        label = SPEAKERS.get(message["role"], message["role"].capitalize())
        text_without_breaks = " ".join(message["content"].split())
        lines.append(f"{label}: {text_without_breaks}")
    return "\n".join(lines)
