"""Provides a NeMo checkpoint that tests share, so they must not change it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.conversion import convert_by_command


@pytest.fixture(scope="session")
def odd_nemo(odd_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model ``odd_llama``, converted to a NeMo checkpoint directory."""
    checkpoint = tmp_path_factory.mktemp("nemo") / "odd.nemo"
    assert convert_by_command("to-nemo", odd_llama, checkpoint) == 0
    return checkpoint
