"""Tests the limits on the text of each source: ``max_tokens``, ``max_documents``, ``#tokens``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recipes.data.corpus import TOKEN_BYTES
from recipes.data.preparation import prepare
from recipes.data.settings import PrepareDataConfig
from recipes.data.tokenizer import DocumentTokenizer
from tests.cpu.data.conftest import LOG, read_texts


@pytest.mark.parametrize(("processes", "option"), [(2, ""), (1, "#tokens=9000")])
def test_a_token_limit_applies_to_each_source_separately(
    cfg: PrepareDataConfig,
    tokenizer: DocumentTokenizer,
    text_file: Path,
    tmp_path: Path,
    processes: int,
    option: str,
) -> None:
    """The limit is an option of each source, or else ``max_tokens``. The lower limit counts."""
    token_limit = 9000
    sources = [f"{source}{option}" for source in cfg.sources]
    limited = replace(cfg, heldout_sources=[], processes=processes)
    limited.max_tokens = 10**9 if option else token_limit
    longest = max(len(document.ids) for document in tokenizer.encode(read_texts(text_file)))
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        state = prepare(replace(limited, sources=sources[:number]), tokenizer, folder, LOG)
        tokens = sum(size for size, _ in state.sizes.values()) // TOKEN_BYTES
        # The last document of a source is not truncated.
        assert number * token_limit <= tokens < number * (token_limit + longest)


@pytest.mark.parametrize("limits", [{"max_tokens": 20_000}, {"max_documents": 500}])
def test_a_limit_on_a_text_file_keeps_the_fractions_of_the_splits(
    tokenizer: DocumentTokenizer, tmp_path: Path, limits: dict[str, int]
) -> None:
    """The limit truncates the file. Each split still has its fraction, within a factor of 2."""
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"{number} {'Some words. ' * 12}" for number in range(8000)))
    cfg = PrepareDataConfig(sources=[str(file)], **limits)  # type: ignore[arg-type]
    sizes = prepare(cfg, tokenizer, tmp_path, LOG).sizes
    total = sum(size for size, _ in sizes.values())
    for split, fraction in cfg.fractions().items():
        assert fraction / 2 < sizes[split][0] / total < 2 * fraction, split
