"""Tests preparation on several ranks, and the files that ``SplitWriter`` writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from recipes.data import preparation, split_writer
from recipes.data.preparation import prepare
from recipes.data.settings import PrepareDataConfig
from recipes.data.split_writer import SplitWriter
from recipes.data.tokenizer import DocumentTokenizer
from tests.cpu.data.conftest import LOG, content
from tests.support.ranks import run_ranks

RANK_SCRIPT = """
import json, os, sys
from pathlib import Path

from recipes.core.metrics import MetricsLog
from recipes.core.stage import StoppedByDeadlineError, rank
from recipes.data import preparation
from recipes.data.preparation import prepare
from recipes.data.settings import PrepareDataConfig
from recipes.data.tokenizer import load_tokenizer, torch_distributed

preparation.BATCH_DOCUMENTS = 64
cfg = PrepareDataConfig(**json.loads(Path(sys.argv[1]).read_text()))
folder = Path(sys.argv[3])
for deadline in (True, True, False):
    os.environ["STAGE_DEADLINE"] = "1" if deadline else ""  # Unix time 1 has passed long ago
    try:
        prepare(cfg, load_tokenizer(Path(sys.argv[2])), folder, MetricsLog(None))
        stopped = False
    except StoppedByDeadlineError:
        stopped = True
    assert deadline or not stopped, rank()
torch_distributed().barrier()
"""


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 3000}, {"max_documents": 100}])
def test_two_ranks_write_the_same_bytes(
    cfg: PrepareDataConfig,
    tokenizer: DocumentTokenizer,
    odd_llama: Path,
    tmp_path: Path,
    limits: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The two ranks stop at a deadline twice and resume."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(preparation, "BATCH_DOCUMENTS", 64)
    prepare(replace(cfg, **limits), tokenizer, folders[0], LOG)
    (tmp_path / "script.py").write_text(RANK_SCRIPT)
    settings = {"sources": cfg.sources, "heldout_sources": cfg.heldout_sources, **limits}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    arguments = (tmp_path / "settings.json", odd_llama, folders[1])
    run_ranks(str(tmp_path / "script.py"), *map(str, arguments))
    assert content(folders[0]) == content(folders[1])


def test_files_equal_those_of_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_writer, "BLOCK", 7)  # several blocks, the last one not full
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 99, n) for n in generator.integers(1, 30, 50)]
    for split, documents in (("some", texts), ("none", [])):
        megatron = IndexedDatasetBuilder(str(tmp_path / f"megatron-{split}.bin"), dtype=np.int32)
        with SplitWriter(tmp_path, [split]) as writer:
            for ids in documents:
                writer.add(split, ids)
                megatron.add_document(torch.tensor(ids), [len(ids)])
        megatron.finalize(str(tmp_path / f"megatron-{split}.idx"))
        for ending in ("bin", "idx"):
            ours = (tmp_path / f"{split}.{ending}").read_bytes()
            assert ours == (tmp_path / f"megatron-{split}.{ending}").read_bytes()
