"""Tests reading Hugging Face datasets from a local folder and from a fake hub."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from recipes.core.errors import RecipeError
from recipes.data.corpus import read_source
from tests.support.hub import fake_hub, run_with_hub

USER = {"content": "Why?", "role": "user"}


def test_the_text_of_a_row_joins_the_named_fields(tmp_path: Path) -> None:
    rows = [{"body": text, "n": {"title": "t"}, "year": 1} for text in (" one ", None, "two")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"hf://{tmp_path}:train"
    assert [document.text for document in read_source(source, "body")] == ["one", "two"]
    # The option ``text`` of a source replaces the default field.
    joined = [document.text for document in read_source(f"{source}#text=n.title,body", "body")]
    assert joined == ["t\n one", "t", "t\ntwo"]
    for field in ("text", "year", "body,year"):  # "text" is missing, and "year" is a number
        message = rf"no text in field '{field}'; it has body \(str\), n \(dict\), year"
        with pytest.raises(RecipeError, match=message):
            list(read_source(source, field))


def test_the_error_lists_the_splits_of_a_dataset(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}')
    with pytest.raises(RecipeError, match=r"split trian of dataset .*'train', 'test'"):
        read_source(f"hf://{tmp_path}:trian", "text")


def test_only_the_columns_of_the_text_are_read(tmp_path: Path) -> None:
    """A dot separates the names of nested fields, but may also be in the name of a column."""
    columns = {"body": ["b"], "n": [{"title": "t"}], "x.y": ["xy"], "messages": [[USER]], "id": [1]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    for fields, expected_columns, text in (
        ("body", {"body"}, "b"),
        ("n.title,body", {"n", "body"}, "t\nb"),
        ("x.y", {"x.y"}, "xy"),
        ("body,missing", {"body"}, "b"),
    ):
        reader: Any = read_source(f"hf://{tmp_path}:train", fields)
        assert set(reader._rows.column_names) == expected_columns
        assert [document.text for document in reader] == [text]
    chats: Any = read_source(f"hf://{tmp_path}:train", "body", chat=True)
    assert chats._rows.column_names == ["messages"]
    assert [json.loads(document.text) for document in chats] == [[USER]]
    with pytest.raises(RecipeError, match=r"it has body \(str\), n "):
        list(read_source(f"hf://{tmp_path}:train", "missing"))
    with_tools = pyarrow.table({"messages": [[USER]], "tools": [["f"]]})
    parquet.write_table(with_tools, tmp_path / "train.parquet")
    with pytest.raises(RecipeError, match="has tools"):
        list(read_source(f"hf://{tmp_path}:train", "body", chat=True))


def test_reading_a_hugging_face_dataset_resumes_within_a_shard(tmp_path: Path) -> None:
    for shard in range(3):
        rows = [json.dumps({"text": f"{shard} {row}"}) for row in range(10)]
        (tmp_path / f"train-{shard}.jsonl").write_text("\n".join(rows))
    source = f"hf://{tmp_path}:train"
    all_documents = list(read_source(source, "text"))
    assert len(all_documents) == 30
    reader = read_source(source, "text")
    first_documents = list(islice(reader, 17))
    state = json.loads(json.dumps(reader.state()))  # states are stored as JSON
    assert first_documents + list(read_source(source, "text", state)) == all_documents


def test_files_of_a_dataset_with_different_types_are_refused_with_a_fix(tmp_path: Path) -> None:
    """pandas writes a column without values as a column of nulls, even if it is not read."""
    for number, language in enumerate((None, "en")):
        table = pyarrow.table({"text": [f"text {number}"], "language": [language]})
        parquet.write_table(table, tmp_path / f"train-{number}.parquet")
    with pytest.raises(RecipeError, match=r"different types: (?s:.*)FOLDER/\*\.parquet"):
        list(read_source(f"hf://{tmp_path}:train", "text"))
    texts = [document.text for document in read_source(str(tmp_path / "*.parquet"), "text")]
    assert texts == ["text 0", "text 1"]


def test_a_dataset_on_a_hub_is_read_at_its_revision_or_newest_commit(tmp_path: Path) -> None:
    script = """
from recipes.data.corpus import read_source
from recipes.data.origins import origin_of, pin_commit
for source in ("hf://me/notes:train", "hf://me/notes:train#revision={old}"):
    origin = origin_of(source)
    texts = [document.text for document in read_source(pin_commit(source, origin), "text")]
    print(origin.licence, origin.commit, *texts)
"""
    old, new = "a" * 40, "b" * 40
    with fake_hub("unused") as hub:
        hub.datasets["me/notes"] = {
            commit: {"train.jsonl": json.dumps({"text": text}).encode()}
            for commit, text in ((old, "before"), (new, "after"))
        }
        output = run_with_hub(hub, tmp_path, script.format(old=old))
    # The licence is that of the fake hub's dataset card.
    assert output.splitlines() == [f"cc0-1.0 {new} after", f"cc0-1.0 {old} before"]
