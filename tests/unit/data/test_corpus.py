from __future__ import annotations

import json
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from recipes.core.errors import RecipeError
from recipes.data.corpus import PARTS, part_of, read_documents, source_problem

if TYPE_CHECKING:
    from pathlib import Path

FRACTIONS = {"validation": 0.02, "calibration": 0.04, "heldout": 0.04}
SHA = "0" * 64


def write(folder: Path, name: str, content: str) -> str:
    file = folder / name
    file.write_text(content, encoding="utf-8")
    return str(file)


def documents(source: str, field: str = "text") -> list[str]:
    return list(read_documents(source, field))


def test_text_is_split_at_blank_lines(tmp_path: Path) -> None:
    source = write(tmp_path, "a.txt", "\n\none\nstill one\n\n  \t\n two ü \n\n\n")
    assert documents(source) == ["one\nstill one", "two ü"]


@pytest.mark.parametrize(
    "content",
    [
        [{"text": "one", "id": 1}, {"text": " two "}, {"text": "  "}],
        ["one", "two", ""],
        {"a": {"text": "one"}, "b": {"text": "two"}},
        {"a": "one", "b": "two"},
    ],
)
def test_json_records(tmp_path: Path, content: Any) -> None:
    assert documents(write(tmp_path, "a.json", json.dumps(content))) == ["one", "two"]


def test_jsonl_records_and_blank_lines(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"text": "one"}\n\n"two"\n{"text": ""}\n')
    assert documents(source) == ["one", "two"]


def test_text_field_is_the_one_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"text": "no", "body": "yes"}')
    assert documents(source, "body") == ["yes"]


@pytest.mark.parametrize("record", ['{"body": "x"}', '{"text": 3}', "7", "null", '["x"]'])
def test_record_without_text_is_numbered(tmp_path: Path, record: str) -> None:
    source = write(tmp_path, "a.jsonl", f'{{"text": "one"}}\n{record}\n')
    with pytest.raises(RecipeError, match="record 2: no text in field 'text'") as caught:
        documents(source)
    assert source in str(caught.value)
    assert "data.text_field" in str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("content", ["{", "one\n", '{"text": "x"} trailing'])
def test_invalid_json_names_the_file(tmp_path: Path, name: str, content: str) -> None:
    source = write(tmp_path, name, content)
    with pytest.raises(RecipeError, match="cannot be read as") as caught:
        documents(source)
    assert source in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_file_that_is_not_utf8_or_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as"):
        documents(str(tmp_path / name))
    (tmp_path / name).unlink()
    with pytest.raises(RecipeError, match="cannot be read as"):
        documents(str(tmp_path / name))


def test_invalid_jsonl_names_the_line(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"text": "one"}\n{"text": "two"}\n{oops\n')
    with pytest.raises(RecipeError, match=r"(line|record) 3"):
        documents(source)


@pytest.mark.parametrize("content", ["3", "null", "true", '"a text"'])
def test_json_that_is_no_collection_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(RecipeError, match=r"a\.json"):
        documents(write(tmp_path, "a.json", content))


def test_good_sources_have_no_problem(tmp_path: Path) -> None:
    for name in ("a.txt", "a.json", "a.jsonl"):
        assert source_problem(write(tmp_path, name, "x")) is None


@pytest.mark.parametrize(
    "source",
    [
        "hf://wikitext@wikitext-2-raw-v1:train",
        "hf://org/data:train[:100]",
        f"pypi://p/1/p/data.json#sha256={SHA}",
    ],
)
def test_remote_sources_are_not_looked_up(source: str) -> None:
    assert source_problem(source) is None


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a", "hf://no-split"])
def test_unsupported_suffix_lists_the_supported(name: str) -> None:
    problem = source_problem(name)
    assert problem is not None
    assert f"'{name}' is not one of .txt, .json, .jsonl" in problem


def test_unsupported_wheel_member() -> None:
    problem = source_problem(f"pypi://p/1/p/data.csv#sha256={SHA}")
    assert problem is not None
    assert "is not one of" in problem


def test_empty_missing_and_folder(tmp_path: Path) -> None:
    assert source_problem(write(tmp_path, "a.txt", "")) == f"'{tmp_path / 'a.txt'}' is empty"
    missing = str(tmp_path / "b.txt")
    assert source_problem(missing) == f"there is no file '{missing}'"
    (tmp_path / "c.txt").mkdir()
    assert source_problem(str(tmp_path / "c.txt")) == f"there is no file '{tmp_path / 'c.txt'}'"


def test_parts_do_not_depend_on_order() -> None:
    texts = [f"document {i}" for i in range(5000)]
    first = {text: part_of(text, FRACTIONS) for text in texts}
    random.Random(0).shuffle(texts)
    assert {text: part_of(text, FRACTIONS) for text in texts} == first


def test_fractions_hold_and_parts_are_disjoint() -> None:
    parts: dict[str, set[str]] = {part: set() for part in PARTS}
    for i in range(5000):
        parts[part_of(f"document {i}", FRACTIONS)].add(f"document {i}")
    expected = {**FRACTIONS, "train": 0.9}
    for part, fraction in expected.items():
        # Four standard deviations of a binomial draw.
        slack = 4 * (fraction * (1 - fraction) / 5000) ** 0.5
        assert abs(len(parts[part]) / 5000 - fraction) < slack, part
    assert sum(len(texts) for texts in parts.values()) == 5000
    assert len(set.union(*parts.values())) == 5000


def test_a_larger_part_keeps_what_it_had() -> None:
    texts = [f"document {i}" for i in range(2000)]
    small = {t for t in texts if part_of(t, {"validation": 0.02}) == "validation"}
    large = {t for t in texts if part_of(t, {"validation": 0.1}) == "validation"}
    assert small < large


@pytest.mark.parametrize(("fraction", "part"), [(0.0, "train"), (1.0, "heldout")])
def test_part_of_extreme_fractions(fraction: float, part: str) -> None:
    counts = Counter(part_of(str(i), {"heldout": fraction}) for i in range(100))
    assert counts == {part: 100}
