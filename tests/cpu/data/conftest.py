"""Text, a tokenizer and settings for tests of ``prepare_data``."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from recipes.core.metrics import MetricsLog
from recipes.data.chat import ChatTokenizer
from recipes.data.corpus import SPLITS
from recipes.data.settings import PrepareDataConfig
from recipes.data.tokenizer import DocumentTokenizer, load_tokenizer

LOG = MetricsLog(None)
"""A log that writes nothing."""
LENGTH = 64
"""Tokens of a sequence of conversations."""


@pytest.fixture(scope="module")
def tokenizer(odd_llama: Path) -> DocumentTokenizer:
    return load_tokenizer(odd_llama)


@pytest.fixture(scope="module")
def chat(odd_llama: Path, tokenizer: DocumentTokenizer) -> ChatTokenizer:
    return ChatTokenizer(odd_llama, tokenizer.end, LENGTH)


def read_texts(text_file: Path) -> list[str]:
    """Reads the texts of a file, without blank lines: they separate documents in ``.txt`` files."""
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    return [re.sub(r"\s*\n\s*", "\n", text).strip() for text in texts]


@pytest.fixture(scope="module")
def cfg(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> PrepareDataConfig:
    """Settings with sources of records, paragraphs and held-out text.

    The three sources use the first 600 texts of ``text_file``. ``records`` has each of its texts
    twice. It shares ten texts with ``prose``, and ``prose`` shares ten others with ``held_out``.
    """
    folder = tmp_path_factory.mktemp("sources")
    texts = read_texts(text_file)
    (folder / "prose.txt").write_text("\n\n".join(texts[300:560]))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts[550:600]))
    (folder / "records.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts[:310] * 2))
    return PrepareDataConfig(
        sources=[str(folder / "records.jsonl"), str(folder / "prose.txt")],
        heldout_sources=[str(folder / "held_out.jsonl")],
    )


def file_hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file of the splits, by file name."""
    files = [file for split in SPLITS for file in folder.glob(f"{split}.*")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
