"""Tests the splits of prepared text, also with several tokenizer processes and after SIGKILL."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.data import preparation, split_writer
from recipes.data.chat import TOO_LONG, ChatTokenizer
from recipes.data.corpus import SPLITS, TOKEN_BYTES, digest
from recipes.data.ledger import Ledger
from recipes.data.preparation import EARLIER, HELD_OUT, PreparationState, prepare
from recipes.data.settings import PrepareDataConfig
from recipes.data.split_writer import SplitWriter
from recipes.data.token_sequences import read_loss_mask, read_tokens
from recipes.data.tokenizer import DocumentTokenizer, encode_all
from tests.cpu.data.conftest import LENGTH, LOG, file_hashes, read_texts
from tests.support.text import write_chats

Conversation = tuple[tuple[int, ...], tuple[bool, ...]]
"""Token ids and loss mask."""


@pytest.fixture(scope="module")
def undisturbed(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreparationState]:
    """Folder and state of a preparation in one process that was never killed."""
    folder = tmp_path_factory.mktemp("result")
    return folder, prepare(cfg, tokenizer, folder, LOG)


def documents(folder: Path, split: str) -> list[tuple[int, ...]]:
    """Returns the token ids of each document of a split."""
    dataset = IndexedDataset(str(folder / split))
    return [tuple(dataset[i].tolist()) for i in range(len(dataset))]


def encode(tokenizer: DocumentTokenizer, texts: Iterable[str]) -> list[tuple[int, ...]]:
    """Returns the token ids of each text."""
    return [tuple(document.ids.tolist()) for document in tokenizer.encode(list(texts))]


def test_every_document_is_in_one_split_and_held_out_sources_are_in_heldout(
    cfg: PrepareDataConfig,
    undisturbed: tuple[Path, PreparationState],
    tokenizer: DocumentTokenizer,
    text_file: Path,
) -> None:
    folder, state = undisturbed
    written = [document for split in SPLITS for document in documents(folder, split)]
    texts = set(read_texts(text_file)[:600])  # the texts of all sources
    assert len(written) == len(set(written))  # no duplicates
    assert set(written) == set(encode(tokenizer, texts))
    for split, (size, count) in state.sizes.items():
        assert count == len(documents(folder, split)) > 0
        assert size == TOKEN_BYTES * sum(map(len, documents(folder, split)))
    for split, tokens in state.sources.items():
        assert TOKEN_BYTES * sum(tokens.values()) == state.sizes[split][0]
        # Sources are in the order of the text. Held-out sources come first.
        assert list(tokens) == [name for name in ("held_out", "records", "prose") if name in tokens]
        assert ("held_out" in tokens) == (split == "heldout")
    assert list(state.sources["train"]) == ["records", "prose"]
    lines = Path(cfg.heldout_sources[0]).read_text().splitlines()
    encoded = encode(tokenizer, (json.loads(line).strip() for line in lines))
    held_out = list(dict.fromkeys(encoded))
    assert documents(folder, "heldout")[: len(held_out)] == held_out
    assert state.sources["heldout"]["held_out"] == sum(map(len, held_out))


def test_excluded_documents_are_in_no_split(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, text_file: Path, tmp_path: Path
) -> None:
    texts = read_texts(text_file)
    excluded, others = set(texts[:40]), set(texts[40:600])
    excluding = replace(cfg, excluded_documents=[digest(text).hex() for text in excluded])
    state = prepare(excluding, tokenizer, tmp_path, LOG)
    written = {document for split in SPLITS for document in documents(tmp_path, split)}
    assert not written & set(encode(tokenizer, excluded))
    assert sum(count for _, count in state.sizes.values()) == len(others - excluded)


def test_peak_memory_does_not_grow_with_the_text(
    tokenizer: DocumentTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tracemalloc measures the memory of Python and NumPy: texts, digests, tokens and lengths."""
    # An index is written in blocks of documents. They are small, so that all three texts fill some.
    monkeypatch.setattr(split_writer, "BLOCK", 512)
    peaks = []  # bytes
    for number in (1_000, 2_000, 10_000):  # the first run also allocates what later runs reuse
        texts = (
            f"{n} of {number} documents, each with different words " * 4 for n in range(number)
        )
        file = tmp_path / f"{len(peaks)}.jsonl"
        file.write_text("".join(f"{json.dumps(text)}\n" for text in texts))
        folder = tmp_path / file.stem
        folder.mkdir()
        tracemalloc.start()
        state = prepare(PrepareDataConfig(sources=[str(file)]), tokenizer, folder, LOG)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(count for _, count in state.sizes.values()) == number
    assert peaks[2] - peaks[1] < 2e5  # the additional texts have 1.6 MB


def _children(pid: int | None) -> list[Path]:
    """Returns the ``stat`` files of a process's children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path(f"/proc/{child}/stat") for child in children]


def _is_running(stat: Path) -> bool:
    """Returns whether a process is alive. ``stat`` has "(name) state"; the state Z is a zombie."""
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _line_count(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def test_a_killed_tokenizer_process_is_reported(tokenizer: DocumentTokenizer) -> None:
    children_before = set(_children(os.getpid()))
    # Far more batches than the two workers can encode before one of them is killed.
    batches = (([f"text {n} " * 100], n) for n in range(10_000))
    encoded = encode_all(tokenizer, batches, 2)
    next(encoded)  # starts the workers
    # The other new child is multiprocessing's resource tracker.
    workers = [
        stat.parent
        for stat in set(_children(os.getpid())) - children_before
        if b"spawn_main" in (stat.parent / "cmdline").read_bytes()
    ]
    os.kill(int(workers[0].name), signal.SIGKILL)
    with pytest.raises(RecipeError, match="a tokenizer process was killed by SIGKILL") as caught:
        list(encoded)
    assert "fewer processes take less memory" in str(caught.value)


@pytest.fixture(scope="module")
def mixed(
    text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PrepareDataConfig, list[str]]:
    """Settings with text, conversations and again text; and the conversations, as JSON."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "texts.jsonl").write_text("".join(text_file.read_text().splitlines(True)[:100]))
    chats = write_chats(folder / "chats.jsonl", text_file, 700)
    # The last source repeats the first, so all its documents are dropped as duplicates.
    sources = [str(folder / "texts.jsonl"), chats, f"{folder}/texts.jsonl#text=text&name=again"]
    lines = (folder / "chats.jsonl").read_text().splitlines()
    conversations = [json.dumps(json.loads(line)["messages"]) for line in lines]
    # A duplicate of the first conversation: an additional field and the order of keys do not count.
    first = json.loads(conversations[0])
    duplicate = [{"id": 1, **dict(reversed(message.items()))} for message in first]
    with (folder / "chats.jsonl").open("a") as file:
        file.write(json.dumps({"messages": duplicate}) + "\n")
    return PrepareDataConfig(sources=sources, seq_length=LENGTH), conversations


@pytest.fixture(scope="module")
def undisturbed_mixed(
    mixed: tuple[PrepareDataConfig, list[str]],
    tokenizer: DocumentTokenizer,
    chat: ChatTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, PreparationState]:
    """Folder and state of a preparation of ``mixed`` that was never killed.

    The batches have 16 documents, as in the test that kills the process. Each batch is packed
    separately, so the size of batches changes the result.
    """
    folder = tmp_path_factory.mktemp("mixed_result")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "BATCH_DOCUMENTS", 16)
        return folder, prepare(mixed[0], tokenizer, folder, LOG, chat)


def test_each_conversation_is_in_one_sequence_with_only_answers_in_the_loss(
    mixed: tuple[PrepareDataConfig, list[str]],
    undisturbed_mixed: tuple[Path, PreparationState],
    tokenizer: DocumentTokenizer,
    chat: ChatTokenizer,
) -> None:
    """In plain text, all tokens except the first of each document are targets of the loss."""
    folder, state = undisturbed_mixed
    encoded = chat.encode(list(dict.fromkeys(mixed[1])))
    usable = [conversation for conversation in encoded if not conversation.left_out_reason]
    written: Counter[Conversation] = Counter()
    packed_tokens = 0
    for split in SPLITS:
        tokens, loss_mask = read_tokens(folder, split), read_loss_mask(folder, split)
        assert loss_mask is not None
        assert len(loss_mask) == len(tokens)
        source_tokens = state.sources[split]
        # The split has the plain text first, and the conversations in tokens [start, stop).
        start = source_tokens.get("texts", 0)
        stop = start + source_tokens["chats"]
        assert sum(source_tokens.values()) == len(tokens)
        assert state.sizes[split][0] == TOKEN_BYTES * len(tokens)
        previous_tokens = np.concatenate([[tokenizer.end], tokens[:-1]])[:start]
        assert (loss_mask[:start] == (previous_tokens != tokenizer.end)).all()
        written.update(_conversations(tokens, loss_mask, start, stop, tokenizer.end))
        packed_tokens += stop - start
    # ``encode`` adds an end token, which ``_conversations`` does not yield.
    pairs = ((item.ids[:-1], np.asarray(item.loss_mask)[:-1]) for item in usable)
    assert written == Counter((tuple(ids.tolist()), tuple(mask.tolist())) for ids, mask in pairs)
    counts = state.conversations["chats"]
    assert counts["used"] == len(usable)
    assert counts["shortened"] == sum(item.shortened for item in usable) > 0
    assert counts["answer tokens"] == sum(sum(mask) for _, mask in written.elements())
    assert counts["tokens"] + counts["padding tokens"] == packed_tokens
    assert counts["padding tokens"] < 0.2 * counts["tokens"]
    assert counts.get(TOO_LONG, 0) == len(encoded) - len(usable)


def _conversations(
    tokens: np.ndarray, loss_mask: np.ndarray, start: int, stop: int, end: int
) -> Iterator[Conversation]:
    """Yields the token ids and the loss mask of each conversation in tokens [start, stop).

    A conversation ends with two end tokens. The first ends the last turn. The second ends the
    document and is not yielded. Other end tokens between conversations are padding.
    """
    # For each sequence that overlaps [start, stop). Negation twice rounds the division up.
    for sequence in range(start // LENGTH, -(-stop // LENGTH)):
        position = max(start, sequence * LENGTH)
        sequence_stop = min(stop, (sequence + 1) * LENGTH)
        while position < sequence_stop:
            if tokens[position] == end:  # padding
                assert not loss_mask[position]
                position += 1
                continue
            is_end = tokens[position:sequence_stop] == end
            # Up to and including the first end token that another one follows.
            size = int(np.flatnonzero(is_end[:-1] & is_end[1:])[0]) + 1
            span = slice(position, position + size)
            yield tuple(tokens[span].tolist()), tuple(loss_mask[span].tolist())
            position += size + 1  # skips the second end token


def prepare_until_killed(
    cfg: PrepareDataConfig,
    tokenizer: DocumentTokenizer,
    folder: Path,
    lines: int,
    chat: ChatTokenizer | None,
) -> None:
    """Prepares in small batches, and waits to be killed when the log has ``lines + 4`` lines.

    The caller kills the process when the log has ``lines`` lines or a few more.
    """
    metrics = folder / "metrics.jsonl"

    class WaitingLog(MetricsLog):
        def log(self, **values: object) -> None:
            super().log(**values)
            if _line_count(metrics) >= lines + 4:
                time.sleep(600)

    preparation.BATCH_DOCUMENTS, preparation.SAVE_SECONDS = 16, 0.01  # only in this forked process
    prepare(cfg, tokenizer, folder, WaitingLog(metrics), chat)


@pytest.mark.parametrize("chats", [False, True])
def test_a_killed_preparation_resumes_and_writes_the_same_bytes(
    chats: bool,
    tokenizer: DocumentTokenizer,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Text is tokenized by two processes, and the expected files were written by one."""
    cfg = request.getfixturevalue("mixed")[0] if chats else request.getfixturevalue("cfg")
    expected = request.getfixturevalue("undisturbed_mixed" if chats else "undisturbed")
    chat = request.getfixturevalue("chat") if chats else None
    metrics, cfg = tmp_path / "metrics.jsonl", replace(cfg, processes=1 if chats else 2)
    kill_at_lines = (30,) if chats else (20, 50)  # of the log, to which each start appends
    for lines in kill_at_lines:
        process = multiprocessing.get_context("fork").Process(
            target=prepare_until_killed, args=(cfg, tokenizer, tmp_path, lines, chat)
        )
        process.start()
        while process.is_alive() and _line_count(metrics) < lines:
            time.sleep(0.001)
        children, deadline = _children(process.pid), time.monotonic() + 300
        process.kill()
        process.join()
        while any(map(_is_running, children)):  # tokenizer processes die with their parent
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.exitcode == -signal.SIGKILL, "the process ended before it could be killed"
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        saved = ledger.progress()
    assert saved is not None
    assert saved["finished_sources"] < 3  # both configs have three sources
    monkeypatch.setattr(preparation, "BATCH_DOCUMENTS", 16)
    assert prepare(cfg, tokenizer, tmp_path, LOG, chat) == expected[1]
    assert file_hashes(tmp_path) == file_hashes(expected[0])
    assert ("train.loss_mask" in file_hashes(tmp_path)) == chats


def test_a_short_held_out_source_is_refused_before_other_text_is_read(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    """A second start refuses it, too, because the first did not record the source as finished."""
    cfg = replace(cfg, seq_length=10**6)  # longer than the source, which must fill one sequence
    for _ in range(2):
        with pytest.raises(RecipeError, match="heldout: held_out"):
            prepare(cfg, tokenizer, tmp_path, LOG)
        assert not (tmp_path / "train.bin").stat().st_size


def test_max_documents_takes_the_first_documents_of_each_source(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, text_file: Path, tmp_path: Path
) -> None:
    limited = replace(cfg, heldout_sources=[], max_documents=40)
    state = prepare(limited, tokenizer, tmp_path, LOG)
    # The first 40 documents of both sources are all different.
    assert sum(count for _, count in state.sizes.values()) == 2 * 40
    texts = read_texts(text_file)
    expected = encode(tokenizer, texts[:40] + texts[300:340])  # records.jsonl, prose.txt
    filled_splits = [split for split, (_, count) in state.sizes.items() if count]
    written = {ids for split in filled_splits for ids in documents(tmp_path, split)}
    assert written == set(expected)


def test_text_that_an_earlier_phase_holds_out_is_held_out_in_a_later_one(
    cfg: PrepareDataConfig,
    tokenizer: DocumentTokenizer,
    undisturbed: tuple[Path, PreparationState],
    tmp_path: Path,
) -> None:
    """The stretches of a text file depend on ``max_tokens``, so the splits of both phases differ.

    ``undisturbed`` has the settings of the second phase, but not the digests from the first.
    """
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    prepare(replace(cfg, max_tokens=2000), tokenizer, first, LOG)
    shutil.copyfile(first / HELD_OUT, second / EARLIER)
    prepare(cfg, tokenizer, second, LOG)
    held_out = set(documents(first, "heldout"))
    assert held_out & set(documents(undisturbed[0], "train"))
    assert held_out <= set(documents(second, "heldout"))


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_the_error_for_a_damaged_ledger_says_what_to_delete(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        for number in range(2000):  # several pages of the SQLite file
            ledger.add_if_new(digest(str(number)))
        ledger.save({})
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(RecipeError, match=r"ledger\.sqlite is damaged") as caught:
        Ledger(path)
    assert f"delete {tmp_path} " in str(caught.value)


def test_a_file_shorter_than_its_recorded_size_is_refused(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, ["train"]) as writer:
        writer.add("train", [1, 2, 3])
    (tmp_path / "train.bin").write_bytes(b"")  # the three tokens are lost
    with pytest.raises(RecipeError, match="is damaged: it is shorter"):
        SplitWriter(tmp_path, ["train"], writer.sizes)
