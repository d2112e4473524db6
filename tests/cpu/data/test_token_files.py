"""Tests that tokens in Megatron's ``.bin`` and ``.idx`` files are checked, split and linked."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from nemo_convert import nemo
from nemo_convert.hf_config import read_architecture
from recipes.core.errors import RecipeError
from recipes.core.files import read_json, sha256_of, sha256_of_each
from recipes.core.stage import Input
from recipes.data.checks import prefix_problems
from recipes.data.corpus import SPLITS
from recipes.data.results import DatasetResult
from recipes.data.settings import PrepareDataConfig
from recipes.data.token_files import (
    open_token_files,
    require_document_end,
    require_valid,
    split_ranges,
    write_split,
)
from recipes.data.token_sequences import read_tokens
from recipes.data.tokenizer import load_tokenizer
from recipes.planning.chain import Chain
from recipes.stages.prepare_data import STAGE
from tests.support.manifests import bare_manifest

END = 7
"""Last token of every document."""
FRACTIONS = PrepareDataConfig().fractions()
"""Fractions of validation, calibration and held-out text; 0.1 in total."""


def write(folder: Path, dtype: type[np.number] = np.uint16, end: int = END) -> Path:
    """Writes 100 documents, and returns the path of their files without the suffix.

    A document has two sequences of 51 tokens. The first ends with token 1, the second with ``end``.
    """
    prefix = folder / "corpus_text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    generator = np.random.default_rng(0)
    for _ in range(100):
        for last in (1, end):
            ids = np.append(generator.integers(8, 280, 50), last)  # the largest is 279
            builder.add_item(torch.from_numpy(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def ignore_progress(done: int, total: int) -> None:
    """Ignores the progress of ``require_valid``."""


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_splits_are_ranges_without_overlap_and_link_to_the_tokens(
    tmp_path: Path, dtype: type[np.number]
) -> None:
    prefix = write(tmp_path, dtype)
    files = open_token_files(prefix)
    require_valid(files, 512, ignore_progress)
    assert require_document_end(prefix, END, str)
    ranges = split_ranges(files, FRACTIONS, None, None)
    # The ranges are adjacent and contain all 100 documents.
    assert [document for split in SPLITS for document in ranges[split]] == [*range(100)]
    out = tmp_path / "out"
    out.mkdir()
    ids_of_splits = []
    for split, documents in ranges.items():
        tokens = write_split(files, documents, out / split)
        assert (out / f"{split}.bin").is_symlink()
        written = IndexedDataset(str(out / split))
        assert len(written) == 2 * len(documents) > 0  # a document has 2 sequences
        assert written.document_indices[-1] == len(written)
        ids = read_tokens(out, split)
        assert np.array_equal(ids, np.concatenate([written[n] for n in range(len(written))]))
        assert len(ids) == tokens
        ids_of_splits.append(ids)
    assert np.array_equal(np.concatenate(ids_of_splits), files.tokens)
    assert len(ranges["train"]) == 90  # all but ``FRACTIONS``
    # The hash of a link is that of the tokens to which it leads.
    links = [out / f"{split}.bin" for split in SPLITS]
    assert sha256_of_each(links) == [sha256_of(Path(f"{prefix}.bin"))] * len(SPLITS)


def test_max_documents_and_max_tokens_limit_the_text(tmp_path: Path) -> None:
    files = open_token_files(write(tmp_path))
    for max_documents, max_tokens in ((50, None), (None, 50 * 102)):  # 102 tokens per document
        ranges = split_ranges(files, FRACTIONS, max_documents, max_tokens)
        assert ranges["heldout"].stop == 50
        assert len(ranges["train"]) == 45  # 90% of 50 documents


def test_damaged_or_foreign_files_are_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path)
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    files = open_token_files(prefix)
    with pytest.raises(RecipeError, match="has token 279, but the model's tokenizer has 279 ids"):
        require_valid(files, 279, ignore_progress)
    with pytest.raises(RecipeError, match="documents end with token 7") as error:
        require_document_end(prefix, 3, lambda token: f"<{token}>")
    assert error.value.fix == "data.document_end='<7>'"
    original, tokens = index.read_bytes(), data.read_bytes()
    damaged = bytearray(original)
    # Overwrites the sixth pointer. It follows the header of 34 bytes, 200 lengths and 5 pointers.
    struct.pack_into("<q", damaged, 34 + 4 * 200 + 8 * 5, 3)
    index.write_bytes(damaged)
    with pytest.raises(RecipeError, match="damaged"):
        require_valid(open_token_files(prefix), 512, ignore_progress)
    # The first document's boundary, which follows 200 pointers and boundary 0. There are 200.
    struct.pack_into("<q", damaged, 34 + 4 * 200 + 8 * 201, 201)
    index.write_bytes(damaged)
    with pytest.raises(RecipeError, match="damaged"):
        require_document_end(prefix, END, str)
    for content, message in (
        (original[:-8], "take"),  # the message says how many bytes the sequences take
        (b"x" + original, "is not an index"),
        (b"", "missing or empty"),
    ):
        index.write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            open_token_files(prefix)
    index.write_bytes(original)
    data.write_bytes(tokens[:-2])
    with pytest.raises(RecipeError, match="its index says"):
        open_token_files(prefix)
    data.unlink()
    with pytest.raises(RecipeError, match="missing"):
        open_token_files(prefix)


def test_the_stage_links_tokens_and_tokenizes_held_out_text(
    tmp_path: Path, odd_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the stage with a Hugging Face folder in place of the teacher's NeMo checkpoint."""
    monkeypatch.setattr(nemo, "find_checkpoint", lambda artifact: odd_llama)
    monkeypatch.setattr(nemo, "side_folder", lambda checkpoint: checkpoint)
    tokenizer = load_tokenizer(odd_llama)
    prefix, out = write(tmp_path, np.int32, tokenizer.end), tmp_path / "stage" / "work" / "artifact"
    out.mkdir(parents=True)
    (tmp_path / "held_out.txt").write_text("A text that only evaluations read. " * 20)
    cfg = PrepareDataConfig(
        stage="prepare_data",
        prefix=f"{prefix}#licence=CC-BY-NC-4.0",
        heldout_sources=[str(tmp_path / "held_out.txt")],
        seq_length=32,
    )
    external_files = [path for path in STAGE.external(cfg).values() if path.stem != "held_out"]
    assert [path.suffix for path in external_files] == [".idx", ".bin"]
    teacher = Input(tmp_path, bare_manifest("import_hf", "checkpoint_nemo", None))
    result = STAGE.run(cfg, {"tokenizer": teacher}, out).result
    assert isinstance(result, DatasetResult)
    # The 100 documents of ``prefix`` are in the first three splits. The held-out source has one.
    assert sum(result.documents[split] for split in SPLITS[:3]) == 100
    assert result.documents["heldout"] == 1
    for split in SPLITS:
        assert (out / f"{split}.bin").is_symlink() == (split != "heldout")
        assert len(read_tokens(out, split)) == result.tokens[split]
    assert [result.licence(source) for source in result.sources] == ["CC-BY-NC-4.0"]
    assert cfg.training_names() == [entry.source for entry in result.source_tokens["train"]]
    assert result.sample == tokenizer.decode(open_token_files(prefix).tokens[:200].tolist())


def test_planning_reports_problems_of_the_prefix(tmp_path: Path) -> None:
    prefix = write(tmp_path)
    assert not _problems(f"{prefix}")
    # Two problems: the files do not exist, and a prefix cannot be combined with sources.
    assert len(_problems(f"{prefix}_typo", sources=["a.txt"])) == 2
    [message] = _problems(f"{prefix}#licence=CC-BY-4.0&weight=2")
    assert "an option other than licence" in message


def test_planning_compares_the_first_documents_with_the_tokenizer(
    tmp_path: Path, odd_llama: Path
) -> None:
    """The tokenizer of ``odd_llama`` has 288 ids, and its ``eos_token`` is "<eos>", id 0."""
    teacher = read_architecture(read_json(odd_llama / "config.json"), str(odd_llama))
    chain = Chain(str(odd_llama), teacher, {})

    def messages(prefix: Path, **settings: Any) -> list[str]:
        cfg = PrepareDataConfig(prefix=str(prefix), seq_length=32, **settings)
        return [problem.what for problem in STAGE.check(cfg, chain)]

    assert not messages(write(tmp_path, end=0))
    [message] = messages(write(tmp_path))
    assert "documents end with token 7 " in message
    assert "not with 0 (<eos>)" in message
    [message] = messages(write(tmp_path, end=0), document_end="<nope>")
    assert "data.document_end=<nope> is not in the tokenizer" in message
    # The largest token of the text is 279.
    [message] = _problems(str(write(tmp_path, end=0)), {"<eos>": 0, "a": 278})
    assert "has token 279, but the model's tokenizer has 279 ids" in message


def _problems(
    prefix: str, vocabulary: Mapping[str, int] | None = None, **settings: Any
) -> list[str]:
    """Returns what is wrong with ``data.prefix``."""
    cfg = PrepareDataConfig(prefix=prefix, **settings)
    return [what for what, _ in prefix_problems(cfg, vocabulary or {}, "<eos>")]
