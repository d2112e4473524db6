"""Tests documents, splits and problems of sources."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections import Counter
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pytest

from recipes.core.errors import RecipeError
from recipes.data import corpus, records
from recipes.data.checks import first_records_problem
from recipes.data.corpus import (
    SPLITS,
    Document,
    digest,
    read_source,
    split_number,
    split_of,
)
from recipes.data.results import DatasetResult, SourceTokens, TrainedSource
from recipes.data.sources import (
    source_bytes,
    source_names,
    source_problem,
    without_weight,
)

FRACTIONS = {"validation": 0.02, "calibration": 0.04, "heldout": 0.04}  # "train" has the remainder
SHA = "0" * 64  # as long as a SHA-256 in hexadecimal


def write(folder: Path, name: str, content: str) -> str:
    """Writes a file and returns its path."""
    file = folder / name
    file.write_text(content, encoding="utf-8")
    return str(file)


def conversation(*texts: str) -> dict[str, Any]:
    """Returns a conversation with these messages, by the user and the assistant in turn."""
    roles = ("user", "assistant") * len(texts)  # more than enough, so ``zip`` is not strict
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


def documents(source: str, field: str = "text") -> list[str]:
    return [document.text for document in read_source(source, field)]


def split(text: str, fractions: dict[str, float] = FRACTIONS) -> str:
    """Returns the split of a document that is not a paragraph. It depends only on the text."""
    return split_of(split_number(Document(text), digest(text)), fractions)


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("a.txt", "\n\none\nstill one\n\n  \t\n two ü \n\n\n", "text"),
        (
            "a.json",
            '[{"text": "one\\nstill one", "id": 1}, {"text": " two ü "}, {"text": " "}]',
            "text",
        ),
        ("a.json", '["one\\nstill one", "two ü", ""]', "text"),
        ("a.json", '{"a": {"text": "one\\nstill one"}, "b": {"text": "two ü"}}', "text"),
        ("a.json", '{"a": "one\\nstill one", "b": "two ü"}', "text"),
        ("a.jsonl", '{"text": "one\\nstill one"}\n\n"two ü"\n{"text": ""}\n', "text"),
        ("a.jsonl", '{"text": "no", "body": "one\\nstill one"}\n"two ü"', "body"),
    ],
)
def test_documents_of_text_and_json_files_are_read(
    tmp_path: Path, name: str, content: str, field: str
) -> None:
    assert documents(write(tmp_path, name, content), field) == ["one\nstill one", "two ü"]


def test_each_conversation_is_one_document(tmp_path: Path) -> None:
    conversations = [conversation("Why?", "So."), conversation("ü")]
    # Blank lines and other fields than "messages" are ignored.
    lines = "\n\n".join(json.dumps({**chat, "id": 3}) for chat in conversations)
    for name, content in (("a.jsonl", lines), ("a.json", json.dumps(conversations))):
        read = list(read_source(write(tmp_path, name, content), "text", chat=True))
        messages = [chat["messages"] for chat in conversations]
        assert [json.loads(document.text) for document in read] == messages
        assert {document.position_in_stretch for document in read} == {None}


def test_half_of_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '"a \\ud83d"\n"\\ud83d\\ude00"\n')
    assert documents(source) == ["a ?", "\U0001f600"]
    source = write(tmp_path, "b.jsonl", json.dumps(conversation("Why\ud83d", "So.")))
    [document] = read_source(source, "", chat=True)
    assert json.loads(document.text) == conversation("Why?", "So.")["messages"]
    assert digest(document.text, chat=True) == digest(document.text)


def test_the_field_of_the_text_is_checked(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"body": "a text"}\n')
    assert first_records_problem(source, "body", chat=False) is None
    assert first_records_problem(f"{source}#text=body", "text", chat=False) is None
    problem, fix = first_records_problem(source, "text", chat=False) or ("", "")
    assert problem == f"{source}, line 1: no text in field 'text'; it has body (str)."
    assert "data.text_field" in fix


def test_only_the_first_records_of_a_file_with_conversations_are_checked(tmp_path: Path) -> None:
    def conversation_problem(source: str, chat: bool = True) -> tuple[str, str] | None:
        return first_records_problem(source, "text", chat=chat)

    good = json.dumps(conversation("Why?", "So."))
    # The invalid line comes after the first ``CHECKED_RECORDS``, which are 100.
    long_file = write(tmp_path, "a.jsonl", f"{good}\n" * 200 + "{oops")
    assert conversation_problem(long_file) is None
    assert conversation_problem(f"{long_file}#format=dialogue", chat=False) is None
    example = '{"messages": [{"role": "user"'
    for line, expected_problem, expected_fix in (
        ('{"text": "a"}', "there is no list of messages in 'messages'", example),
        ('{"messages": [{"role": "user"}]}', "message 1 has no text as its 'content'", example),
        ("{oops", "Expecting property name", "correct the file"),
    ):
        source = write(tmp_path, "a.jsonl", f"\n\n{line}\n")
        problem, fix = conversation_problem(source) or ("", "")
        assert f"line 3: {expected_problem}" in problem
        assert "a.jsonl" in problem
        assert expected_fix in fix
    problem, _ = conversation_problem(write(tmp_path, "a.txt", "text")) or ("", "")
    assert problem == f"'{tmp_path}/a.txt' has no conversations"


@pytest.mark.parametrize("record", ['{"body": "x"}', '{"text": 3}', "7", "null", '["x"]'])
def test_the_error_names_the_line_of_a_record_without_text(tmp_path: Path, record: str) -> None:
    source = write(tmp_path, "a.jsonl", f'{{"text": "one"}}\n{record}\n')
    with pytest.raises(RecipeError, match="line 2: no text in field 'text'") as caught:
        documents(source)
    assert source in str(caught.value)
    assert "data.text_field" in str(caught.value)


BINARY, UNREADABLE = b"\xff\xfe\x00", "cannot be read as"  # bytes that are not UTF-8; an error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *(("a.txt", content, UNREADABLE) for content in (None, BINARY)),
        *(
            (name, content, UNREADABLE)
            for name in ("a.json", "a.jsonl")
            for content in (None, BINARY, b"{", b"one\n", b'{"text": "x"} trailing')
        ),
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n{oops\n', "line 3"),
        *(("a.json", content, UNREADABLE) for content in (b"3", b"null", b"true", b'"a text"')),
    ],
)
def test_the_error_names_an_unreadable_file(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    """With ``content=None``, the file does not exist."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        documents(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        *((name, None) for name in ("a.txt", "a.json", "a.jsonl")),
        ("hf://wikitext@wikitext-2-raw-v1:train", None),
        *((f"hf://o/data:{s}", "add #tokens=NUMBER or set") for s in ("train[:9]", "train+test")),
        (f"pypi://p/1/p/data.json#sha256={SHA}", None),
        *(
            (name, f"'{name}' is not one of .txt, .json, .jsonl")
            for name in ("a.doc", "a.xlsx", "a", "hf://no-split", "teacher://text")
        ),
        ("teacher://text#tokens=100", "'teacher://text' is not one of"),
        ("hf://org/data:train#wieght=1", "option: #wieght=1"),
        ("hf://org/data:train#wieght=1&weight=2", "option: #wieght=1"),
        ("a.jsonl#weight=1#weight=-2", "option: #weight=1"),
        (f"pypi://p/1/p/data.doc#sha256={SHA}", "is not one of .txt, .json, .jsonl"),
        ("teacher://chat#tokens=100&seed=3", None),
        ("teacher://chat#tokens=many", "tokens=many"),
        ("teacher://chat#seed=-1", "seed=-1"),
        ("teacher://chat#prompts=missing.jsonl", "missing.jsonl"),
        ("hf://org/data:train#tokens=100", None),
        ("hf://org/data:train#tokens=0", "tokens=0"),
        ("hf://org/data:train#seed=1", "only teacher://chat has"),
        ("empty.txt", "'empty.txt' is empty"),
        ("missing.txt", "there is no file 'missing.txt'"),
        ("folder.txt", "there is no file 'folder.txt'"),
    ],
)
def test_problems_of_sources_are_found_without_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, problem: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.json", "a.jsonl"):
        write(tmp_path, name, "x")
    write(tmp_path, "empty.txt", "")
    (tmp_path / "folder.txt").mkdir()
    message = source_problem(source)
    assert message is None if problem is None else problem in str(message)


def test_splits_have_their_fractions_and_are_disjoint() -> None:
    splits: dict[str, set[str]] = {name: set() for name in SPLITS}
    for i in range(5000):
        splits[split(f"document {i}")].add(f"document {i}")
    for name, fraction in {**FRACTIONS, "train": 0.9}.items():
        slack = 4 * (fraction * (1 - fraction) / 5000) ** 0.5  # 4 binomial standard deviations
        assert abs(len(splits[name]) / 5000 - fraction) < slack, name
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == 5000


def test_a_larger_split_keeps_its_documents() -> None:
    texts = [f"document {i}" for i in range(2000)]
    small = {t for t in texts if split(t, {"validation": 0.02}) == "validation"}
    large = {t for t in texts if split(t, {"validation": 0.1}) == "validation"}
    assert small < large


@pytest.mark.parametrize(("fraction", "name"), [(0.0, "train"), (1.0, "heldout")])
def test_split_of_extreme_fractions(fraction: float, name: str) -> None:
    assert Counter(split(str(i), {"heldout": fraction}) for i in range(100)) == {name: 100}


@pytest.mark.parametrize("stretches", [1, 3])
def test_each_split_has_one_run_of_paragraphs_in_each_stretch(
    tmp_path: Path, stretches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stretch is a section of a source. Its paragraphs are divided among the splits in order."""
    paragraphs = [f"paragraph {i:4}" for i in range(3000)]
    source = write(tmp_path, "a.txt", "\n\n".join(paragraphs))
    monkeypatch.setattr(corpus, "STRETCH_BYTES", Path(source).stat().st_size / stretches)
    read = list(read_source(source, "text"))
    splits = [split_of(split_number(d, digest(d.text)), FRACTIONS) for d in read]
    assert [name for name, _ in groupby(splits)] == [*FRACTIONS, "train"] * stretches
    for name, fraction in FRACTIONS.items():
        # In each stretch, the range of a split is rounded to whole paragraphs at both ends.
        assert splits.count(name) == pytest.approx(3000 * fraction, abs=2 * stretches)


def test_files_of_a_pattern_are_one_source(tmp_path: Path) -> None:
    for name, text in (("b.txt", "three\n\nfour"), ("a.txt", "one\n\ntwo"), ("c.md", "no")):
        write(tmp_path, name, text)
    source = f"{tmp_path}/*.txt"
    assert source_problem(source) is None
    assert documents(source) == ["one", "two", "three", "four"]
    # The files have 8 and 11 bytes. The second paragraph of each starts at byte 5, or at 8 + 7.
    positions = [document.position_in_stretch for document in read_source(source, "text")]
    assert positions == [0, 5 / 19, 8 / 19, 15 / 19]
    assert source_bytes(source) == 19
    assert source_problem(f"{tmp_path}/*.jsonl") == f"there is no file '{tmp_path}/*.jsonl'"
    (tmp_path / "d" / "e").mkdir(parents=True)
    write(tmp_path / "d" / "e", "f.txt", "five")
    assert documents(f"{tmp_path}/**/**/*.txt") == ["one", "two", "three", "four", "five"]


def test_a_text_without_blank_lines_is_split_at_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST_PARAGRAPH", 10)  # "three" starts before byte 10
    assert documents(write(tmp_path, "a.txt", "one two\nthree\nfour")) == ["one two\nthree", "four"]


def test_gzipped_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "one"}\n"two"\n'))
    assert documents(str(file)) == ["one", "two"]
    assert source_bytes(str(file)) is None
    file.write_bytes(file.read_bytes()[:-9])  # the checksum and the end of the data are missing
    with pytest.raises(RecipeError, match=r"cannot be read as \.jsonl\.gz"):
        documents(str(file))


def test_options_select_the_text_and_the_name_of_a_source(tmp_path: Path) -> None:
    ambiguous = write(tmp_path, "a.jsonl", '{"doc": {"body": "one"}, "doc.body": "two"}\n')
    # A field whose name is ``doc.body`` has priority over the field ``body`` of ``doc``.
    assert documents(f"{ambiguous}#text=doc.body") == ["two"]
    nested = write(tmp_path, "b.jsonl", '{"doc": {"body": "one"}}\n')
    assert documents(f"{nested}#name=some&text=doc.body", "text") == ["one"]
    with pytest.raises(RecipeError, match=r"no text in field 'doc\.none'"):
        documents(f"{nested}#text=doc.none")
    wheel = f"pypi://p/1/p/x/*.txt#sha256={SHA}"
    names_by_source = {
        f"{nested}#name=some": "some",
        nested: "b",
        f"{wheel}&name=speeches": "speeches",
        wheel: "x",
        f"pypi://p/1/p/lines.jsonl.gz#sha256={SHA}&text=doc.body": "lines",
        "hf://org/data@en:train#revision=abc": "data",
    }
    assert list(source_names(list(names_by_source))) == list(names_by_source.values())
    same_names = ["x/part.txt", "y/part.txt", "z/part-2.txt", "part.txt"]
    unique_names = ["part", "part-2", "part-2-2", "part-3"]
    assert source_names(same_names) == dict(zip(unique_names, same_names, strict=True))
    assert all(source_problem(source) is None for source in names_by_source)
    assert "not on a hub" in str(source_problem(f"{nested}#revision=abc"))


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_a_new_reader_resumes_at_a_saved_state(tmp_path: Path, name: str) -> None:
    texts = [f"document {i}" if i % 3 else "" for i in range(1, 20)]  # every third one is empty
    lines = "\n".join(map(json.dumps, texts))
    contents = {"a.txt": "\n\n".join(texts), "a.json": json.dumps(texts), "a.jsonl": lines}
    source = write(tmp_path, name, contents[name])
    whole = list(read_source(source, "text"))
    for count in (0, 1, 5, len(whole)):
        reader = read_source(source, "text")
        start = list(islice(reader, count))
        state = json.loads(json.dumps(reader.state()))  # as after a restart
        assert start + list(read_source(source, "text", state)) == whole


def test_a_resumed_reader_does_not_read_earlier_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, f"{name}.jsonl", "\n".join(json.dumps(f"{name}{n}") for n in range(3)))
    source = f"{tmp_path}/*.jsonl"
    reader = read_source(source, "text")
    assert [document.text for document in islice(reader, 4)] == ["a0", "a1", "a2", "b0"]
    (tmp_path / "a.jsonl").write_text("not JSON")
    rest = read_source(source, "text", reader.state())
    assert [document.text for document in rest] == ["b1", "b2"]
    assert rest.fraction() == 1


def test_without_weight_removes_only_the_option_weight() -> None:
    for source, expected in (
        ("a.txt#weight=0.3", "a.txt"),
        ("a.txt#weight=0.3&name=x", "a.txt#name=x"),
        ("a.txt#name=x&weight=1e-3&licence=MIT", "a.txt#name=x&licence=MIT"),
        (f"pypi://a/1/b.txt#sha256={SHA}&weight=2", f"pypi://a/1/b.txt#sha256={SHA}"),
        ("a.txt#name=weight", "a.txt#name=weight"),
    ):
        assert without_weight(source) == expected


def test_tokens_and_epochs_of_a_training_run() -> None:
    train = [SourceTokens("a", 100), SourceTokens("b", 300), SourceTokens("c", 0)]
    result = DatasetResult({}, {}, [], {"train": train}, document_end=0)
    unweighted = result.trained_sources(800, {})
    assert unweighted == [TrainedSource("a", 200, 2.0), TrainedSource("b", 600, 2.0)]
    # Sequences 0, 1 and 9 of 10 tokens start in "a" (tokens 0 to 99), and sequence 10 in "b".
    cached = result.with_sequences([0, 1, 9, 10], 10).trained_sources(800, {})
    assert cached == [TrainedSource("a", 600, 20), TrainedSource("b", 200, 20)]
    assert result.trained_sources(800, {"b": 1, "a": 3}) == [
        TrainedSource("b", 200, 200 / 300),
        TrainedSource("a", 600, 6.0),
    ]


def test_a_source_in_a_wheel_is_checked_if_the_cache_has_a_valid_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_RECIPES_CACHE", str(tmp_path))
    wheel = tmp_path / SHA[:16] / "texts-1.0.whl"
    existing, missing = (f"pypi://texts/1.0/texts/{n}.py#sha256={SHA}" for n in ("*", "b"))
    wheel.parent.mkdir()
    wheel.write_bytes(b"not a wheel")
    assert source_problem(missing) is None
    assert source_bytes(existing) is None
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("texts/a.py", "pass")
    assert source_problem(existing) is None
    problem = str(source_problem(missing))
    assert problem.startswith("texts 1.0 has no file texts/b.py; list them with: unzip -l ")
