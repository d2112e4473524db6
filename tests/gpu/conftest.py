"""Tests on a GPU: skipped without one, unless the plan asks for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu.plan import RESULTS
from tests.gpu.small import Small, reference


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is here. The plan runs a step that needs no GPU on a machine that has none."""
    import torch

    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if RESULTS not in os.environ and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where figures and traces are left, and the small model is."""
    return Path(os.environ.get(RESULTS) or tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="session")
def small(results: Path, text_file: Path) -> Small:
    """A small model that went through the chain on the CPU."""
    return reference(results, text_file)
