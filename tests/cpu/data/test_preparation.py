"""Text to parts: the same bytes from any number of processes, and after any ``kill -9``."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.data import part_writer, preparation
from recipes.data.corpus import PARTS, digest
from recipes.data.part_writer import PartWriter
from recipes.data.preparation import Progress, prepare
from recipes.data.settings import PrepareDataConfig
from recipes.data.tokenizer import DocumentTokenizer, load_tokenizer

LOG = MetricsLog(None)


@pytest.fixture(scope="module")
def tokenizer(odd_llama: Path) -> DocumentTokenizer:
    return load_tokenizer(odd_llama)


def read(text_file: Path) -> list[str]:
    """Its texts, without blank lines in them."""
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    return [re.sub(r"\s*\n\s*", "\n", text).strip() for text in texts]


@pytest.fixture(scope="module")
def cfg(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> PrepareDataConfig:
    """Records, paragraphs and a held-out source, with documents that are in several of them."""
    folder = tmp_path_factory.mktemp("sources")
    texts = read(text_file)
    (folder / "prose.txt").write_text("\n\n".join(texts[300:560]))
    (folder / "apart.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts[550:600]))
    (folder / "records.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts[:310] * 2))
    return PrepareDataConfig(
        sources=[str(folder / "records.jsonl"), str(folder / "prose.txt")],
        heldout_sources=[str(folder / "apart.jsonl")],
    )


@pytest.fixture(scope="module")
def whole(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Progress]:
    """All of it, undisturbed, in one process."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, prepare(cfg, tokenizer, folder, LOG)


def content(folder: Path) -> dict[str, str]:
    names = [f"{part}.{ending}" for part in PARTS for ending in ("bin", "idx")]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def documents(folder: Path, part: str) -> list[tuple[int, ...]]:
    dataset = IndexedDataset(str(folder / part))
    return [tuple(dataset[i].tolist()) for i in range(len(dataset))]


def test_every_document_is_taken_once(
    whole: tuple[Path, Progress], tokenizer: DocumentTokenizer, text_file: Path
) -> None:
    folder, done = whole
    found = [document for part in PARTS for document in documents(folder, part)]
    texts = set(read(text_file)[:600])
    assert len(found) == len(set(found))
    assert set(found) == {tuple(ids.tolist()) for ids in tokenizer.encode(sorted(texts))}
    for part, (size, count) in done.sizes.items():
        assert count == len(documents(folder, part)) > 0
        assert size == 4 * sum(map(len, documents(folder, part)))
    for part, of_part in done.sources.items():
        assert 4 * sum(of_part.values()) == done.sizes[part][0]
        assert list(of_part) == [n for n in ("apart", "records", "prose") if n in of_part]
        assert ("apart" in of_part) == (part == "heldout")
    assert list(done.sources["train"]) == ["records", "prose"]


def test_a_held_out_source_is_held_out_whole(
    cfg: PrepareDataConfig, whole: tuple[Path, Progress], tokenizer: DocumentTokenizer
) -> None:
    lines = Path(cfg.heldout_sources[0]).read_text().splitlines()
    apart = [tuple(i.tolist()) for i in tokenizer.encode([json.loads(t).strip() for t in lines])]
    assert documents(whole[0], "heldout")[: len(set(apart))] == list(dict.fromkeys(apart))
    assert whole[1].sources["heldout"]["apart"] == sum(map(len, set(apart)))


def test_more_processes_write_the_same_bytes(
    cfg: PrepareDataConfig,
    whole: tuple[Path, Progress],
    tokenizer: DocumentTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preparation, "BATCH_DOCUMENTS", 16)  # so that both have much to do
    done = prepare(replace(cfg, processes=2), tokenizer, tmp_path, LOG)
    assert done == whole[1]
    assert content(tmp_path) == content(whole[0])


def test_a_killed_process_is_named(tokenizer: DocumentTokenizer) -> None:
    encoded = tokenizer.encode_all((([f"text {n}"], n) for n in range(10_000)), 2)
    next(encoded)
    victims = [
        stat.parent
        for stat in _children(os.getpid())
        if b"spawn_main" in (stat.parent / "cmdline").read_bytes()
    ]
    os.kill(int(victims[0].name), signal.SIGKILL)
    with pytest.raises(RecipeError, match="a process that tokenizes was killed by SIGKILL") as e:
        list(encoded)
    assert "fewer processes take less memory" in str(e.value)


def prepare_in_small_steps(cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, to: Path) -> None:
    preparation.BATCH_DOCUMENTS, preparation.KEEP_SECONDS = 16, 0.01
    prepare(cfg, tokenizer, to, MetricsLog(to / "metrics.jsonl"))


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_work_goes_on_to_the_same_bytes(
    cfg: PrepareDataConfig,
    whole: tuple[Path, Progress],
    tokenizer: DocumentTokenizer,
    tmp_path: Path,
    processes: int,
) -> None:
    metrics, several = tmp_path / "metrics.jsonl", replace(cfg, processes=processes)
    for lines in (20, 50):
        process = multiprocessing.get_context("fork").Process(
            target=prepare_in_small_steps, args=(several, tokenizer, tmp_path)
        )
        process.start()
        while process.is_alive() and _lines(metrics) < lines:
            time.sleep(0.001)
        children = _children(process.pid)
        process.kill()
        process.join()
        _wait_until(lambda: not any(map(_runs, children)))
        assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed"
    with preparation.Ledger(tmp_path / "ledger.sqlite") as ledger:
        kept = ledger.progress()
    assert kept is not None
    assert kept["done"] < 3
    done = prepare(cfg, tokenizer, tmp_path, LOG)
    assert done == whole[1]
    assert content(tmp_path) == content(whole[0])


def _children(pid: int | None) -> list[Path]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path(f"/proc/{child}/stat") for child in found]


def _runs(stat: Path) -> bool:
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_budget_stops_within_a_source(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, tmp_path: Path, processes: int
) -> None:
    budget = 9000
    limited = replace(cfg, heldout_sources=[], max_tokens=budget, processes=processes)
    done = prepare(limited, tokenizer, tmp_path, LOG)
    longest = max(len(document) for part in PARTS for document in documents(tmp_path, part))
    taken = sum(size for size, _ in done.sizes.values()) // 4
    assert 2 * budget <= taken < 2 * (budget + longest)
    alone = replace(limited, sources=cfg.sources[:1])
    (tmp_path / "one").mkdir()
    first = prepare(alone, tokenizer, tmp_path / "one", LOG)
    assert budget <= sum(size for size, _ in first.sizes.values()) // 4 < budget + longest


def test_documents_can_be_limited(
    cfg: PrepareDataConfig, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    limited = replace(cfg, heldout_sources=[], max_documents=40)
    done = prepare(limited, tokenizer, tmp_path, LOG)
    assert sum(count for _, count in done.sizes.values()) == 80


def test_the_index_is_megatrons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_writer, "BLOCK", 7)
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 99, n) for n in generator.integers(1, 30, 50)]
    for part, chosen in (("some", texts), ("none", [])):
        theirs = IndexedDatasetBuilder(str(tmp_path / f"theirs-{part}.bin"), dtype=np.int32)
        with PartWriter(tmp_path, [part]) as writer:
            for ids in chosen:
                writer.add(part, ids)
                theirs.add_document(torch.tensor(ids), [len(ids)])
        theirs.finalize(str(tmp_path / f"theirs-{part}.idx"))
        for ending in ("bin", "idx"):
            ours = (tmp_path / f"{part}.{ending}").read_bytes()
            assert ours == (tmp_path / f"theirs-{part}.{ending}").read_bytes()


@pytest.mark.parametrize("damage", ["cut short", "overwritten"])
def test_a_damaged_ledger_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.sqlite"
    with preparation.Ledger(path) as ledger:
        for number in range(2000):
            ledger.is_new(digest(str(number)))
        ledger.keep({})
    if damage == "cut short":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(RecipeError, match=r"ledger\.sqlite is damaged \(.+\): what was taken") as e:
        preparation.Ledger(path)
    assert f"delete {tmp_path} to prepare the text anew" in str(e.value)


def test_lost_files_are_not_made_up(tmp_path: Path) -> None:
    with PartWriter(tmp_path, ["train"]) as writer:
        writer.add("train", [1, 2, 3])
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(RecipeError, match="has lost what was written"):
        PartWriter(tmp_path, ["train"], writer.sizes)
