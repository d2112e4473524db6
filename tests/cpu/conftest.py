"""Fixtures: tiny models and a folder with a short path.

Tests share the models, so they must not change them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import EVEN, ODD, write_tiny_model


@pytest.fixture(scope="session")
def odd_llama(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A Llama of the shape ``ODD``: 7 heads, no size a multiple of 64, and tied embeddings."""
    return write_tiny_model(tmp_path_factory.mktemp("odd") / "odd", text_file, **ODD)


@pytest.fixture(scope="session")
def even_llama(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A Llama of the shape ``EVEN``: sizes that two ranks can split, and untied embeddings."""
    return write_tiny_model(tmp_path_factory.mktemp("even") / "even", text_file, **EVEN)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a short path, because a Unix socket's path has at most 107 characters."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
