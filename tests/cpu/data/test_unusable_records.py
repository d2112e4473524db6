"""Tests that single unusable records do not stop a preparation, and that unreadable sources do."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from recipes.core.errors import RecipeError
from recipes.data.chat import ChatTokenizer
from recipes.data.checks import first_records_problem
from recipes.data.corpus import HAS_TOOLS, NOT_A_CONVERSATION, SPLITS, read_source, split_digest
from recipes.data.preparation import prepare
from recipes.data.settings import PrepareDataConfig
from recipes.data.tokenizer import DocumentTokenizer
from tests.cpu.data.conftest import LENGTH, LOG
from tests.support.text import write_chats


def test_unusable_conversations_are_counted_and_left_out(
    tokenizer: DocumentTokenizer, chat: ChatTokenizer, text_file: Path, tmp_path: Path
) -> None:
    """The first and the last records have tools or no text, in a file and in a hub's data set."""
    chats = tmp_path / "data" / "train.jsonl"
    chats.parent.mkdir()
    write_chats(chats, text_file, 200)
    good = chats.read_text()
    question = {"role": "user", "content": "Why?"}
    with_tools = json.dumps({"messages": [question], "tools": ["f"]})
    unusable = [with_tools, with_tools, json.dumps({"messages": [{**question, "content": None}]})]
    lines = [*unusable, *good.splitlines(), '{"messages": []}']
    chats.write_text("\n".join(lines))
    sources = {"file": f"{chats}#format=chat", "hub": f"hf://{chats.parent}:train#format=chat"}
    for name, source in sources.items():
        cfg = PrepareDataConfig(sources=[source], seq_length=LENGTH)
        assert first_records_problem(source, "text", chat=True) is None
        folder = tmp_path / name
        folder.mkdir()
        [counts] = prepare(cfg, tokenizer, folder, LOG, chat).conversations.values()
        assert counts[HAS_TOOLS] == 2
        assert counts[NOT_A_CONVERSATION] == 2
        assert counts["used"] > 150  # the others are duplicates, too long or without a question
    chats.write_text("\n".join(unusable))
    what, _ = first_records_problem(f"{chats}#format=chat", "text", chat=True) or ("", "")
    assert "line 1: it has tools" in what


def test_messages_may_have_values_that_are_not_json(tmp_path: Path) -> None:
    message = {"role": "user", "content": "Why?", "time": datetime(2025, 1, 2, tzinfo=UTC)}
    parquet.write_table(pyarrow.table({"messages": [[message]]}), tmp_path / "a.parquet")
    [document] = read_source(str(tmp_path / "a.parquet"), "text", chat=True)
    assert json.loads(document.text)[0]["content"] == "Why?"


def test_conversations_with_the_same_question_are_in_the_same_split(
    tokenizer: DocumentTokenizer, chat: ChatTokenizer, tmp_path: Path
) -> None:
    """200 questions have three answers each. A system message alone is not a question."""
    conversations = [
        [{"role": "user", "content": f"Why {n}?"}, {"role": "assistant", "content": f"So {m}."}]
        for n in range(200)
        for m in range(3)
    ]
    digests = {split_digest(json.dumps(messages), chat=True) for messages in conversations}
    assert len(digests) == 200
    system = {"role": "system", "content": "Be brief."}
    answers = ([system, {"role": "assistant", "content": text}] for text in ("a", "b"))
    assert len({split_digest(json.dumps(messages), chat=True) for messages in answers}) == 2
    text = "\n".join(json.dumps({"messages": messages}) for messages in conversations)
    (tmp_path / "a.jsonl").write_text(text)
    source = f"{tmp_path}/a.jsonl#format=chat"
    state = prepare(PrepareDataConfig(sources=[source], seq_length=LENGTH), tokenizer, tmp_path,
                    LOG, chat)  # fmt: skip
    assert all(documents % 3 == 0 for _, documents in state.sizes.values())
    assert sum(documents for _, documents in state.sizes.values()) == 600


def test_text_without_blank_lines_is_in_all_splits(
    tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    lines = (f"Line {n} of the file is one document.\n" for n in range(60_000))  # 2 MB
    (tmp_path / "a.txt").write_text("".join(lines))
    cfg = PrepareDataConfig(sources=[str(tmp_path / "a.txt")])
    sizes = prepare(cfg, tokenizer, tmp_path, LOG).sizes
    total = sum(size for size, _ in sizes.values())
    fractions = {"train": 1 - sum(cfg.fractions().values()), **cfg.fractions()}
    for split in SPLITS:
        assert sizes[split][0] / total == pytest.approx(fractions[split], abs=0.015), split


def test_a_hub_data_set_that_cannot_be_read_is_refused_before_other_text_is_tokenized(
    tokenizer: DocumentTokenizer, cfg: PrepareDataConfig, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    sources = [*cfg.sources, f"hf://{tmp_path}:trian"]
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="trian"):
        prepare(replace(cfg, sources=sources), tokenizer, tmp_path / "out", LOG)
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("caf\u00e9".encode("latin-1"), "is not in UTF-8: byte 3 is 0xe9"),
        ("word".encode("utf-16"), "is UTF-16: byte 0"),
    ],
)
def test_the_plan_checks_the_encoding_of_text(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.txt").write_bytes(content + b" " * 70_000)
    what, fix = first_records_problem(f"{tmp_path}/*.txt", "text", chat=False) or ("", "")
    assert problem in what
    assert "iconv" in fix
    # A character that the checked bytes end within is not an error.
    (tmp_path / "a.txt").write_text("x" * (2**16 - 1) + "\u00e9", encoding="utf-8")
    assert first_records_problem(f"{tmp_path}/*.txt", "text", chat=False) is None
