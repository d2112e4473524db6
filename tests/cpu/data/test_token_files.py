"""Tests how tokens in Megatron's ``.bin`` and ``.idx`` files are checked, split and linked."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from nemo_convert import nemo
from recipes.core.errors import RecipeError
from recipes.core.files import sha256_of, sha256_of_each
from recipes.core.stage import Input
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
from recipes.stages.prepare_data import STAGE, _prefix_problems
from tests.support.manifests import bare_manifest

END = 7
FRACTIONS = PrepareDataConfig().fractions()
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Returns a function that writes documents, each of two sequences of 51 tokens."""

    def write_documents(
        dtype: type[np.number] = np.uint16, documents: int = 100, end: int = END
    ) -> Path:
        prefix = tmp_path / "corpus_text_document"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        generator = np.random.default_rng(0)
        for _ in range(documents):
            for last in (1, end):
                ids = np.append(generator.integers(8, 280, 50), last)  # the largest is 279
                builder.add_item(torch.from_numpy(ids))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write_documents


def ignore(done: int, total: int) -> None:
    """Reports no progress."""


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_splits_are_ranges_without_overlap_and_link_to_the_tokens(
    write: Write, tmp_path: Path, dtype: type[np.number]
) -> None:
    prefix = write(dtype)
    files = open_token_files(prefix)
    require_valid(files, 512, ignore)
    assert require_document_end(files, END, str)
    ranges = split_ranges(files, FRACTIONS, None, None)
    assert [n for split in SPLITS for n in ranges[split]] == [*range(100)]
    out = tmp_path / "out"
    out.mkdir()
    ids_of_splits = []
    for split, documents in ranges.items():
        tokens = write_split(files, documents, out / split)
        assert (out / f"{split}.bin").is_symlink()
        written = IndexedDataset(str(out / split))
        assert len(written) == 2 * len(documents) > 0
        assert written.document_indices[-1] == len(written)
        ids = read_tokens(out, split)
        assert np.array_equal(ids, np.concatenate([written[n] for n in range(len(written))]))
        assert len(ids) == tokens
        ids_of_splits.append(ids)
    assert np.array_equal(np.concatenate(ids_of_splits), files.tokens)
    assert len(ranges["train"]) == 90
    links = [out / f"{split}.bin" for split in SPLITS]
    assert sha256_of_each(links) == [sha256_of(Path(f"{prefix}.bin"))] * len(SPLITS)


def test_limits_shorten_the_text(write: Write) -> None:
    files = open_token_files(write())
    for max_documents, max_tokens in ((50, None), (None, 50 * 102)):  # 2 * 51 tokens a document
        ranges = split_ranges(files, FRACTIONS, max_documents, max_tokens)
        assert ranges["heldout"].stop == 50
        assert len(ranges["train"]) == 45


def test_damaged_or_foreign_files_are_refused(write: Write) -> None:
    prefix = write()
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    files = open_token_files(prefix)
    with pytest.raises(RecipeError, match="has token 279, but the model's tokenizer has 279 ids"):
        require_valid(files, 279, ignore)
    with pytest.raises(RecipeError, match="documents end with token 7") as error:
        require_document_end(files, 3, lambda token: f"<{token}>")
    assert error.value.fix == "data.document_end='<7>'"
    original, tokens = index.read_bytes(), data.read_bytes()
    damaged = bytearray(original)
    struct.pack_into("<q", damaged, 34 + 4 * 200 + 8 * 5, 3)  # after header, lengths, 5 pointers
    index.write_bytes(damaged)
    with pytest.raises(RecipeError, match="damaged"):
        require_valid(open_token_files(prefix), 512, ignore)
    for content, what in (
        (original[:-8], "take"),
        (b"x" + original, "is not an index"),
        (b"", "missing or empty"),
    ):
        index.write_bytes(content)
        with pytest.raises(RecipeError, match=what):
            open_token_files(prefix)
    index.write_bytes(original)
    data.write_bytes(tokens[:-2])
    with pytest.raises(RecipeError, match="its index says"):
        open_token_files(prefix)
    data.unlink()
    with pytest.raises(RecipeError, match="missing"):
        open_token_files(prefix)


def test_the_stage_links_tokens_and_tokenizes_held_out_text(
    write: Write, tmp_path: Path, odd_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the stage. Only the teacher's checkpoint is replaced, by a Hugging Face folder."""
    monkeypatch.setattr(nemo, "find_checkpoint", lambda artifact: odd_llama)
    monkeypatch.setattr(nemo, "side_folder", lambda checkpoint: checkpoint)
    tokenizer = load_tokenizer(odd_llama)
    prefix, out = write(np.int32, end=tokenizer.end), tmp_path / "stage" / "work" / "artifact"
    out.mkdir(parents=True)
    (tmp_path / "held_out.txt").write_text("A text that only evaluations read. " * 20)
    cfg = PrepareDataConfig(
        stage="prepare_data",
        prefix=f"{prefix}#licence=CC-BY-NC-4.0",
        heldout_sources=[str(tmp_path / "held_out.txt")],
        seq_length=32,
    )
    assert [path.suffix for path in STAGE.external(cfg).values() if path.stem != "held_out"] == [
        ".idx",
        ".bin",
    ]
    teacher = Input(tmp_path, bare_manifest("import_hf", "checkpoint_nemo", None))
    result = STAGE.run(cfg, {"tokenizer": teacher}, out).result
    assert isinstance(result, DatasetResult)
    assert sum(result.documents[split] for split in SPLITS[:3]) == 100  # all of ``prefix``
    assert result.documents["heldout"] == 1
    for split in SPLITS:
        assert (out / f"{split}.bin").is_symlink() == (split != "heldout")
        assert len(read_tokens(out, split)) == result.tokens[split]
    assert [result.licence(source) for source in result.sources] == ["CC-BY-NC-4.0"]
    assert cfg.training_names() == [entry.source for entry in result.source_tokens["train"]]
    assert result.sample == tokenizer.decode(open_token_files(prefix).tokens[:200].tolist())


def test_plans_check_the_files(write: Write) -> None:
    prefix = write()
    assert not [*_prefix_problems(PrepareDataConfig(prefix=str(prefix)))]
    both = PrepareDataConfig(prefix=f"{prefix}_typo", sources=["a.txt"])
    assert len([*_prefix_problems(both)]) == 2  # sources are set, too, and the files do not exist
    other_option = PrepareDataConfig(prefix=f"{prefix}#licence=CC-BY-4.0&weight=2")
    [(what, _)] = _prefix_problems(other_option)
    assert "an option other than licence" in what
