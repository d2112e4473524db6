"""Tests preparation on two ranks, and compares ``SplitWriter``'s files with Megatron's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from recipes.data import preparation, split_writer
from recipes.data.preparation import prepare
from recipes.data.settings import PrepareDataConfig
from recipes.data.split_writer import SplitWriter
from recipes.data.tokenizer import DocumentTokenizer
from tests.cpu.data.conftest import LOG, file_hashes
from tests.support.ranks import run_ranks

RANK_SCRIPT = """
# Arguments: settings of PrepareDataConfig as JSON, folder of a tokenizer, folder of the splits.
import json, os, sys
from pathlib import Path

from recipes.core.metrics import MetricsLog
from recipes.core.stage import StoppedByDeadlineError, rank
from recipes.data import preparation
from recipes.data.preparation import prepare
from recipes.data.settings import PrepareDataConfig
from recipes.data.tokenizer import load_tokenizer, torch_distributed

preparation.BATCH_DOCUMENTS = 64  # small, so that there are several batches
cfg = PrepareDataConfig(**json.loads(Path(sys.argv[1]).read_text()))
folder = Path(sys.argv[3])
for deadline in (True, True, False):
    os.environ["STAGE_DEADLINE"] = "1" if deadline else ""  # Unix time 1 has passed long ago
    try:
        prepare(cfg, load_tokenizer(Path(sys.argv[2])), folder, MetricsLog(None))
        stopped = False
    except StoppedByDeadlineError as error:
        assert "the same command resumes" in str(error)
        stopped = True
    assert stopped == deadline, rank()
torch_distributed().barrier()
"""


def test_two_ranks_write_the_same_bytes_as_one(
    cfg: PrepareDataConfig,
    tokenizer: DocumentTokenizer,
    odd_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One rank runs without a stop. Two ranks stop at a deadline twice, and resume each time.

    One source ends at its token limit, one at ``max_documents``, and the others at their ends.
    """
    by_one_rank, by_two_ranks = tmp_path / "one", tmp_path / "two"
    by_one_rank.mkdir()
    by_two_ranks.mkdir()
    monkeypatch.setattr(preparation, "BATCH_DOCUMENTS", 64)
    records, prose = cfg.sources
    settings: dict[str, Any] = {
        "sources": [f"{records}#tokens=3000&name=some", records, prose],
        "heldout_sources": cfg.heldout_sources,
        "max_documents": 350,
    }
    state = prepare(PrepareDataConfig(**settings), tokenizer, by_one_rank, LOG)
    assert 3000 <= sum(tokens.get("some", 0) for tokens in state.sources.values()) < 6000
    (tmp_path / "script.py").write_text(RANK_SCRIPT)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    arguments = (tmp_path / "settings.json", odd_llama, by_two_ranks)
    run_ranks(str(tmp_path / "script.py"), *map(str, arguments))
    assert file_hashes(by_one_rank) == file_hashes(by_two_ranks)


def test_files_equal_those_of_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_writer, "BLOCK", 7)  # 50 documents: 7 full blocks, and one of 1
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 30, 50)  # tokens of each document
    random_documents = [generator.integers(0, 99, length) for length in lengths]
    for split, documents in (("filled", random_documents), ("empty", [])):
        megatron = IndexedDatasetBuilder(str(tmp_path / f"megatron-{split}.bin"), dtype=np.int32)
        with SplitWriter(tmp_path, [split]) as writer:
            for ids in documents:
                writer.add(split, ids)
                megatron.add_document(torch.tensor(ids), [len(ids)])
        megatron.finalize(str(tmp_path / f"megatron-{split}.idx"))
        for suffix in ("bin", "idx"):
            ours = (tmp_path / f"{split}.{suffix}").read_bytes()
            assert ours == (tmp_path / f"megatron-{split}.{suffix}").read_bytes()
