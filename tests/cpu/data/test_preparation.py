"""Tests the splits of prepared text, also with several processes and after ``kill -9``."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.stage import DEADLINE, StoppedByDeadlineError
from recipes.data import preparation, split_writer
from recipes.data.chat import TOO_LONG, ChatTokenizer
from recipes.data.corpus import SPLITS, digest
from recipes.data.preparation import EARLIER, HELD_OUT, PreparationState, prepare
from recipes.data.settings import PrepareDataConfig
from recipes.data.token_sequences import read_loss_mask, read_tokens
from recipes.data.tokenizer import DocumentTokenizer, encode_all
from tests.cpu.data.conftest import LOG, content, read
from tests.support.text import write_chats

LENGTH = 64
"""Tokens of a sequence."""


@pytest.fixture(scope="module")
def undisturbed(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreparationState]:
    """The result of an undisturbed preparation in one process."""
    folder = tmp_path_factory.mktemp("result")
    return folder, prepare(cfg, tokenizer, folder, LOG)


def documents(folder: Path, split: str) -> list[tuple[int, ...]]:
    dataset = IndexedDataset(str(folder / split))
    return [tuple(dataset[i].tolist()) for i in range(len(dataset))]


def test_every_document_is_in_one_split_and_held_out_sources_are_in_heldout(
    cfg: PrepareDataConfig,
    undisturbed: tuple[Path, PreparationState],
    tokenizer: DocumentTokenizer,
    text_file: Path,
) -> None:
    folder, done = undisturbed
    written = [document for split in SPLITS for document in documents(folder, split)]
    texts = set(read(text_file)[:600])
    assert len(written) == len(set(written))
    assert set(written) == {tuple(d.ids.tolist()) for d in tokenizer.encode(sorted(texts))}
    for split, (size, count) in done.sizes.items():
        assert count == len(documents(folder, split)) > 0
        assert size == 4 * sum(map(len, documents(folder, split)))
    for split, tokens in done.sources.items():
        assert 4 * sum(tokens.values()) == done.sizes[split][0]
        assert list(tokens) == [n for n in ("held_out", "records", "prose") if n in tokens]
        assert ("held_out" in tokens) == (split == "heldout")
    assert list(done.sources["train"]) == ["records", "prose"]
    lines = Path(cfg.heldout_sources[0]).read_text().splitlines()
    encoded = tokenizer.encode([json.loads(line).strip() for line in lines])
    held_out = list(dict.fromkeys(tuple(d.ids.tolist()) for d in encoded))
    assert documents(folder, "heldout")[: len(held_out)] == held_out
    assert done.sources["heldout"]["held_out"] == sum(map(len, held_out))


def test_excluded_documents_are_in_no_split(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, text_file: Path, tmp_path: Path
) -> None:
    excluded, others = set(read(text_file)[:40]), set(read(text_file)[40:600])
    excluding = replace(cfg, excluded_documents=[digest(text).hex() for text in excluded])
    done = prepare(excluding, tokenizer, tmp_path, LOG)
    written = {document for split in SPLITS for document in documents(tmp_path, split)}
    assert not written & {tuple(d.ids.tolist()) for d in tokenizer.encode([*excluded])}
    assert sum(count for _, count in done.sizes.values()) == len(others - excluded)


def test_ten_times_the_text_takes_the_same_memory(
    tokenizer: DocumentTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traced memory is that of Python and NumPy: texts, digests, tokens and lengths."""
    monkeypatch.setattr(
        split_writer, "BLOCK", 512
    )  # small, so that all three texts have full blocks
    peaks = []
    for number in (2_000, 2_000, 20_000):  # the first run also allocates what later runs reuse
        texts = (
            f"{n} of {number} documents, each with different words " * 4 for n in range(number)
        )
        file = tmp_path / f"{len(peaks)}.jsonl"
        file.write_text("".join(f"{json.dumps(text)}\n" for text in texts))
        (folder := tmp_path / file.stem).mkdir()
        tracemalloc.start()
        done = prepare(PrepareDataConfig(sources=[str(file)]), tokenizer, folder, LOG)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(count for _, count in done.sizes.values()) == number
    assert peaks[2] - peaks[1] < 2e5


def test_more_processes_write_the_same_bytes(
    cfg: PrepareDataConfig,
    undisturbed: tuple[Path, PreparationState],
    tokenizer: DocumentTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preparation, "BATCH_DOCUMENTS", 16)  # both processes get many batches
    done = prepare(replace(cfg, processes=2), tokenizer, tmp_path, LOG)
    assert done == undisturbed[1]
    assert content(tmp_path) == content(undisturbed[0])


def test_a_killed_tokenizer_process_is_reported(tokenizer: DocumentTokenizer) -> None:
    children_before = set(_children(os.getpid()))
    encoded = encode_all(tokenizer, (([f"text {n} " * 100], n) for n in range(10_000)), 2)
    next(encoded)
    workers = [
        stat.parent
        for stat in set(_children(os.getpid())) - children_before
        if b"spawn_main" in (stat.parent / "cmdline").read_bytes()
    ]
    os.kill(int(workers[0].name), signal.SIGKILL)
    with pytest.raises(RecipeError, match="a tokenizer process was killed by SIGKILL") as e:
        list(encoded)
    assert "fewer processes take less memory" in str(e.value)


@pytest.fixture(scope="module")
def chat(odd_llama: Path, tokenizer: DocumentTokenizer) -> ChatTokenizer:
    return ChatTokenizer(odd_llama, tokenizer.end, LENGTH)


@pytest.fixture(scope="module")
def mixed(
    text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PrepareDataConfig, list[str]]:
    """Settings with a source of conversations between two of text, and the conversations' texts."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "texts.jsonl").write_text("".join(text_file.read_text().splitlines(True)[:100]))
    chats = write_chats(folder / "chats.jsonl", text_file, 700)
    # The last source repeats the first, so all its documents are dropped as duplicates.
    sources = [str(folder / "texts.jsonl"), chats, f"{folder}/texts.jsonl#text=text&name=again"]
    lines = (folder / "chats.jsonl").read_text().splitlines()
    # Another order of keys, and another field, do not make another conversation.
    reordered = [{"id": 1, **dict(reversed(m.items()))} for m in json.loads(lines[0])["messages"]]
    with (folder / "chats.jsonl").open("a") as file:
        file.write(json.dumps({"messages": reordered}) + "\n")
    chat_texts = [
        "".join(m["content"] + "<eos>" for m in json.loads(li)["messages"]) for li in lines
    ]
    return PrepareDataConfig(sources=sources, seq_length=LENGTH), chat_texts


@pytest.fixture(scope="module")
def undisturbed_mixed(
    mixed: tuple[PrepareDataConfig, list[str]],
    tokenizer: DocumentTokenizer,
    chat: ChatTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, PreparationState]:
    """The result in batches of 16, as in the test that kills the process.

    Each batch is packed separately, so its size changes the result.
    """
    folder = tmp_path_factory.mktemp("mixed_result")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "BATCH_DOCUMENTS", 16)
        return folder, prepare(mixed[0], tokenizer, folder, LOG, chat)


def test_conversations_lie_whole_in_sequences_with_only_answers_in_the_loss(
    mixed: tuple[PrepareDataConfig, list[str]],
    undisturbed_mixed: tuple[Path, PreparationState],
    tokenizer: DocumentTokenizer,
    odd_llama: Path,
) -> None:
    """Of plain text, all tokens except the first of each document are targets of the loss."""
    hf_tokenizer, (folder, done) = AutoTokenizer.from_pretrained(odd_llama), undisturbed_mixed
    chat_ids = (tuple(hf_tokenizer(text)["input_ids"]) for text in dict.fromkeys(mixed[1]))
    remaining = Counter(chat_ids)
    used = shortened = packed_tokens = answers = 0
    for split in SPLITS:
        tokens, loss_mask = read_tokens(folder, split), read_loss_mask(folder, split)
        assert loss_mask is not None
        assert len(loss_mask) == len(tokens)
        source_tokens = done.sources[split]
        start = source_tokens.get("texts", 0)
        stop = start + source_tokens["chats"]
        assert 4 * sum(source_tokens.values()) == done.sizes[split][0] == 4 * len(tokens)
        before = np.concatenate([[tokenizer.end], tokens[:-1]])[:start]
        assert (loss_mask[:start] == (before != tokenizer.end)).all()
        for ids, mask in _conversations(tokens, loss_mask, start, stop, tokenizer.end):
            if remaining[ids] > 0:
                remaining[ids] -= 1
            else:  # the start of a conversation that was shortened because it is too long
                assert any(chat[: len(ids)] == ids for chat in remaining if len(chat) >= LENGTH)
                shortened += 1
            turn, expected = 0, []  # every second turn is an answer
            for token in ids:
                expected.append(turn % 2 == 1)
                turn += token == tokenizer.end
            assert mask == expected
            used, answers = used + 1, answers + sum(mask)
        packed_tokens += stop - start
    counts = done.conversations["chats"]
    assert (counts["used"], counts["answer tokens"]) == (used, answers)
    assert counts["tokens"] + counts["padding tokens"] == packed_tokens
    assert counts["padding tokens"] < 0.2 * counts["tokens"]
    missing = [ids for ids, n in remaining.items() if n > 0]
    assert len(missing) == counts.get(TOO_LONG, 0) + shortened
    assert counts["shortened"] == shortened > 0
    assert all(len(ids) >= LENGTH for ids in missing)
    assert min(remaining.values()) == 0


def _conversations(
    tokens: np.ndarray, loss_mask: np.ndarray, start: int, stop: int, end: int
) -> Iterator[tuple[tuple[int, ...], list[bool]]]:
    """Yields ids and masks of conversations.

    A conversation ends with two end tokens: one ends the last turn, and the other, which is not
    yielded, ends the document.
    """
    for sequence in range(start // LENGTH, -(-stop // LENGTH)):
        position = max(start, sequence * LENGTH)
        last = min(stop, (sequence + 1) * LENGTH)
        while position < last:
            if tokens[position] == end:  # padding
                assert not loss_mask[position]
                position += 1
                continue
            ends = tokens[position:last] == end
            size = int(np.flatnonzero(ends[:-1] & ends[1:])[0]) + 1
            span = slice(position, position + size)
            yield tuple(tokens[span].tolist()), loss_mask[span].tolist()
            position += size + 1


def prepare_until_killed(
    cfg: PrepareDataConfig,
    tokenizer: DocumentTokenizer,
    folder: Path,
    lines: int,
    chat: ChatTokenizer | None,
) -> None:
    """Prepares in small batches, and waits to be killed a few log lines after ``lines`` lines."""
    metrics = folder / "metrics.jsonl"

    class WaitingLog(MetricsLog):
        def log(self, **values: object) -> None:
            super().log(**values)
            if _lines(metrics) >= lines + 4:
                time.sleep(600)

    preparation.BATCH_DOCUMENTS, preparation.SAVE_SECONDS = 16, 0.01
    prepare(cfg, tokenizer, folder, WaitingLog(metrics), chat)


@pytest.mark.parametrize(("chats", "processes"), [(False, 1), (False, 2), (True, 1)])
def test_a_killed_preparation_resumes_and_writes_the_same_bytes(
    chats: bool,
    processes: int,
    tokenizer: DocumentTokenizer,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = request.getfixturevalue("mixed")[0] if chats else request.getfixturevalue("cfg")
    expected = request.getfixturevalue("undisturbed_mixed" if chats else "undisturbed")
    chat = request.getfixturevalue("chat") if chats else None
    metrics, killed_cfg = tmp_path / "metrics.jsonl", replace(cfg, processes=processes)
    for lines in (30,) if chats else (20, 50):  # kills once or twice
        process = multiprocessing.get_context("fork").Process(
            target=prepare_until_killed, args=(killed_cfg, tokenizer, tmp_path, lines, chat)
        )
        process.start()
        while process.is_alive() and _lines(metrics) < lines:
            time.sleep(0.001)
        children, deadline = _children(process.pid), time.monotonic() + 300
        process.kill()
        process.join()
        while any(map(_is_running, children)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.exitcode == -signal.SIGKILL, "the process ended before it could be killed"
    with preparation.Ledger(tmp_path / "ledger.sqlite") as ledger:
        saved = ledger.progress()
    assert saved is not None
    assert saved["finished_sources"] < 3
    monkeypatch.setattr(preparation, "BATCH_DOCUMENTS", 16)
    assert prepare(cfg, tokenizer, tmp_path, LOG, chat) == expected[1]
    assert content(tmp_path) == content(expected[0])
    assert ("train.loss_mask" in content(tmp_path)) == chats


def test_the_deadline_stops_and_the_next_start_resumes(
    cfg: PrepareDataConfig,
    tokenizer: DocumentTokenizer,
    undisturbed: tuple[Path, PreparationState],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(DEADLINE, "1")  # in 1970, so each start stops after one batch
    for _ in range(3):
        with pytest.raises(StoppedByDeadlineError, match="the same command resumes"):
            prepare(cfg, tokenizer, tmp_path, LOG)
    monkeypatch.delenv(DEADLINE)
    prepare(cfg, tokenizer, tmp_path, LOG)
    assert content(tmp_path) == content(undisturbed[0])


def test_a_short_held_out_source_is_refused_before_other_text_is_read(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    """A second start refuses it, too: the first did not save that the source is finished."""
    cfg = replace(cfg, seq_length=10**6)
    for _ in range(2):
        with pytest.raises(RecipeError, match="heldout: held_out"):
            prepare(cfg, tokenizer, tmp_path, LOG)
        assert not (tmp_path / "train.bin").stat().st_size


def _children(pid: int | None) -> list[Path]:
    """Returns the ``stat`` files of a process's children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path(f"/proc/{child}/stat") for child in children]


def _is_running(stat: Path) -> bool:
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def test_max_documents_takes_the_first_documents_of_each_source(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, text_file: Path, tmp_path: Path
) -> None:
    limited = replace(cfg, heldout_sources=[], max_documents=40)
    done = prepare(limited, tokenizer, tmp_path, LOG)
    assert sum(count for _, count in done.sizes.values()) == 80  # two sources, no shared documents
    texts = read(text_file)
    first = [tuple(d.ids.tolist()) for d in tokenizer.encode(texts[:40] + texts[300:340])]
    filled = [split for split, (_, count) in done.sizes.items() if count]
    assert {ids for split in filled for ids in documents(tmp_path, split)} == set(first)


def test_text_that_an_earlier_phase_holds_out_is_held_out_in_a_later_one(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    """The parts of a text file depend on ``max_tokens``, so the splits of both phases differ."""
    first, alone, second = (tmp_path / name for name in ("first", "alone", "second"))
    for folder in (first, alone, second):
        folder.mkdir()
    prepare(replace(cfg, max_tokens=2000), tokenizer, first, LOG)
    shutil.copyfile(first / HELD_OUT, second / EARLIER)
    for folder in (alone, second):
        prepare(cfg, tokenizer, folder, LOG)
    held_out = set(documents(first, "heldout"))
    assert held_out & set(documents(alone, "train"))
    assert held_out <= set(documents(second, "heldout"))
