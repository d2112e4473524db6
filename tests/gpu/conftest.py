"""Tests on a GPU: skipped without one, unless the plan asks for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu.plan import RESULTS
from tests.gpu.small import Small, reference


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks GPU tests; without a GPU they are skipped, unless the plan runs them."""
    import torch

    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if RESULTS not in os.environ and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of results, traces and the small model."""
    return Path(os.environ.get(RESULTS) or tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="session")
def small(results: Path, text_file: Path) -> Small:
    """A small model that went through the chain on the CPU."""
    return reference(results, text_file)
