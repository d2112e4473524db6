"""Tests reading of text files, tables, records with several fields, and dialogues."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from recipes.core.errors import RecipeError
from recipes.data.corpus import read_source
from tests.unit.data.test_corpus import documents, write


def test_python_and_markup_files_are_one_document_each(tmp_path: Path) -> None:
    for name in ("a.py", "b.rst", "c.md"):
        source = write(tmp_path, name, "first = 1\r\n\n\nsecond = 2\n")
        assert documents(source) == ["first = 1\n\n\nsecond = 2"]
        [document] = read_source(source, "text")
        assert document.position_in_stretch is None  # only paragraphs have a position


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tab", "\t"), ("tsv", "\t")])
def test_a_column_of_a_table_is_read(suffix: str, delimiter: str, tmp_path: Path) -> None:
    rows = [("id", "text", "title"), ("1", '"one, ""two"""', "A"), ("2", "three", "B")]
    content = "\n".join(map(delimiter.join, rows))
    source = write(tmp_path, f"a.{suffix}", content)
    assert documents(source) == ['one, "two"', "three"]
    assert documents(f"{source}#text=title,text") == ['A\none, "two"', "B\nthree"]
    with pytest.raises(RecipeError, match="row 1: no text in field 'body'"):
        documents(source, "body")
    broken = write(tmp_path, f"b.{suffix}", 'text\n"open')  # the quotation mark is not closed
    with pytest.raises(RecipeError, match=rf"cannot be read as .{suffix}: unexpected end"):
        documents(broken)


def test_only_a_csv_file_may_have_cells_with_line_breaks(tmp_path: Path) -> None:
    """In a table with tabs, a quotation mark may be an ordinary character.

    So the reader raises an error. For a CSV file, it joins rows 1 to 3, as the marks demand.
    """
    rows = ["id,text", '1,"Hello', "2,first", '3,World"', "4,end"]
    for suffix in ("tab", "tsv"):
        table = write(tmp_path, f"a.{suffix}", "\n".join(rows).replace(",", "\t"))
        with pytest.raises(RecipeError, match="row 1, up to line 4"):
            documents(table)
        table = write(tmp_path, f"b.{suffix}", 'id\ttext\n1\t"a\tb"')
        with pytest.raises(RecipeError, match="row 1, up to line 2"):
            documents(table)
    assert documents(write(tmp_path, "a.csv", "\n".join(rows))) == [
        "Hello\n2,first\n3,World",
        "end",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,title\none,A\ntwo", "row 2 has 1 cells, but the first line names 2"),
        ("text,title\none,A,B", "row 1 has 3 cells"),
        ("\ntext,title\none,A", "row 1 has 2 cells, but the first line names 0"),
    ],
)
def test_a_row_with_too_few_or_too_many_cells_is_an_error(
    content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        documents(write(tmp_path, "a.csv", content))
    # Blank lines after the first line are not rows.
    assert documents(write(tmp_path, "b.csv", "text\n\none\n\n")) == ["one"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\n\ntwo"),
        ("a.md", "one"),
        ("a.json", '["one", "two"]'),
        ("b.json", '{"1": "one"}'),
        ("a.jsonl", '"one"\n"two"'),
        ("a.csv", "text\none"),
    ],
)
def test_a_byte_order_mark_is_not_text(name: str, content: str, tmp_path: Path) -> None:
    with_mark = documents(write(tmp_path, name, f"\ufeff{content}"))
    without_mark = documents(write(tmp_path, name, content))
    assert with_mark == without_mark


def test_fields_and_lists_of_a_record_are_joined(tmp_path: Path) -> None:
    recipe = {"title": "Tea", "time": None, "how": {"steps": ["Boil water.", "Wait."]}, "n": 3}
    source = write(tmp_path, "a.json", json.dumps({"tea": recipe}))
    assert documents(f"{source}#text=title,time,how.steps") == ["Tea\nBoil water.\nWait."]
    assert documents(f"{source}#text=time") == []
    # A number is not text, even beside a field with text.
    for fields in ("n,time", "title,n"):
        with pytest.raises(RecipeError, match=f"record 1: no text in field '{fields}'"):
            documents(f"{source}#text={fields}")


def test_a_dialogue_is_read_as_text_or_as_chat(tmp_path: Path) -> None:
    def message(sender: str, text: str) -> dict[str, str]:
        return {"sender": sender, "text": text}

    messages = [
        [message("x", "Hi."), message("x", "How\nare you?")],  # a list of messages is allowed
        [message("y", "Fine.")],
        message("x", "Ok."),
    ]
    source = write(tmp_path, "a.json", json.dumps({"1": {"messages": messages}}))
    assert documents(f"{source}#format=dialogue") == ["A: Hi. How are you?\nB: Fine.\nA: Ok."]
    [chat] = read_source(source, "text", chat=True)
    assert [turn["role"] for turn in json.loads(chat.text)] == ["user", "assistant", "user"]
    assert json.loads(chat.text)[0]["content"] == "Hi.\nHow\nare you?"
    one_person = write(tmp_path, "b.json", json.dumps([{"messages": messages[:1]}]))
    assert documents(f"{one_person}#format=dialogue") == []  # nobody answers
    messages_of_three = [*messages, message("z", "Me too.")]
    three_people = write(tmp_path, "c.json", json.dumps([{"messages": messages_of_three}]))
    with pytest.raises(RecipeError, match="record 1: 3 people speak, not two"):
        documents(f"{three_people}#format=dialogue")


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ('{"text": "one", "url": "u"}', "text"),
        ('{"url": "u", "title": "t", "text": "one"}', "title,text"),
        ('{"text": "one"}\n{"text": "two"}\n', "text"),
        ('{"id": 1, "text": "one"}\n{"id": 2, "text": "two"}\n', "text"),
        ('{"a": "one"}\n{"b": "two"}\n', "text"),
    ],
)
def test_json_with_a_single_record_or_with_lines_is_refused(
    content: str, field: str, tmp_path: Path
) -> None:
    """Read as a mapping of records, the first file would give the documents "one" and "u"."""
    with pytest.raises(RecipeError, match=r"(?s)a\.json cannot be read.*\.jsonl"):
        documents(write(tmp_path, "a.json", content), field)
    # Here, "text" is the name of a record, because its value is a mapping.
    mapping = write(tmp_path, "b.json", '{"text": {"text": "one"}, "url": "two"}')
    assert documents(mapping) == ["one", "two"]


@pytest.mark.parametrize(
    "message",
    [
        {"sender": "x", "text": None},
        {"sender": "x", "text": {"k": 1}},
        {"sender": ["x"], "text": "Hi."},
        {"sender": None, "text": "Hi."},
    ],
)
def test_senders_and_texts_of_dialogues_are_checked(
    message: dict[str, object], tmp_path: Path
) -> None:
    valid = {"sender": 1, "text": "Hi."}
    source = write(tmp_path, "a.json", json.dumps([{"messages": [valid, message]}]))
    with pytest.raises(RecipeError, match=r"record 1: .*message 2"):
        documents(f"{source}#format=dialogue")


def test_only_the_needed_columns_of_a_parquet_file_are_read(tmp_path: Path) -> None:
    """Python has no date after the year 9999, so reading the column ``day`` fails."""
    day = pyarrow.array([10**7], pyarrow.int32()).cast(pyarrow.date32())
    table = pyarrow.table({"n.t": ["one"], "body": ["two"], "day": day})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert documents(f"{tmp_path}/a.parquet#text=n.t,body,missing") == ["one\ntwo"]
    for field in ("day", "missing"):  # if no requested column exists, all columns are read
        with pytest.raises(RecipeError, match=r"cannot be read as .parquet: date value out"):
            documents(f"{tmp_path}/a.parquet#text={field}")


def test_zstandard_and_parquet_files_are_read(tmp_path: Path) -> None:
    """The compressed file has two frames, because tools such as pzstd write several."""
    frames = b"".join(
        pyarrow.compress(line, codec="zstd", asbytes=True)
        for line in (b'{"text": "one"}\n{"text": "two"}\n', b'{"text": "three"}\n')
    )
    compressed = tmp_path / "a.jsonl.zst"
    compressed.write_bytes(frames)
    assert documents(str(compressed)) == ["one", "two", "three"]
    compressed.write_bytes(frames[:-3])
    with pytest.raises(RecipeError, match=r"cannot be read as .jsonl.zst"):
        documents(str(compressed))
    table = tmp_path / "a.parquet"
    chats = [[{"role": "user", "content": text}] for text in ("", "y")]
    # In Parquet, each message has every field. Chat templates of Llama and Mistral fail on null and
    # on empty lists, so the reader removes such fields. It keeps the empty text of ``content``.
    removed_fields: dict[str, object] = {"name": None, "tool_calls": []}
    rows = [[message | removed_fields for message in chat] for chat in chats]
    parquet.write_table(pyarrow.table({"body": ["one", "two"], "messages": rows}), table)
    assert documents(f"{table}#text=body") == ["one", "two"]
    [first, _] = read_source(str(table), "text", chat=True)
    assert json.loads(first.text) == chats[0]
    with pytest.raises(RecipeError, match="row 1: no text in field 'text'"):
        documents(str(table))
    table.write_bytes(table.read_bytes()[:-4])
    with pytest.raises(RecipeError, match=r"cannot be read as .parquet"):
        documents(str(table))
