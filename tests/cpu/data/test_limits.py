"""Tests how much text of each source is used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recipes.data.preparation import prepare
from recipes.data.settings import PrepareDataConfig
from recipes.data.tokenizer import DocumentTokenizer
from tests.cpu.data.conftest import LOG, read


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("option", ["", "#tokens=9000"])
def test_a_limit_counts_for_each_source(
    cfg: PrepareDataConfig,
    tokenizer: DocumentTokenizer,
    text_file: Path,
    tmp_path: Path,
    processes: int,
    option: str,
) -> None:
    budget = 9000
    sources = [f"{source}{option}" for source in cfg.sources]
    limited = replace(cfg, heldout_sources=[], processes=processes)
    limited.max_tokens = 10**9 if option else budget
    longest = max(len(d.ids) for d in tokenizer.encode(read(text_file)))
    for number in (1, 2):
        (folder := tmp_path / str(number)).mkdir()
        done = prepare(replace(limited, sources=sources[:number]), tokenizer, folder, LOG)
        tokens = sum(size for size, _ in done.sizes.values()) // 4
        assert number * budget <= tokens < number * (budget + longest)


@pytest.mark.parametrize("limits", [{"max_tokens": 20_000}, {"max_documents": 500}])
def test_a_limit_on_a_text_file_keeps_the_fractions_of_the_splits(
    tokenizer: DocumentTokenizer, tmp_path: Path, limits: dict[str, int]
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"{number} {'Some words. ' * 12}" for number in range(8000)))
    cfg = PrepareDataConfig(sources=[str(file)], **limits)  # type: ignore[arg-type]
    sizes = prepare(cfg, tokenizer, tmp_path, LOG).sizes
    total = sum(size for size, _ in sizes.values())
    for split, fraction in cfg.fractions().items():
        assert fraction / 2 < sizes[split][0] / total < 2 * fraction, split
