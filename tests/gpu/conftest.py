"""Fixtures of the GPU tests.

Without a GPU, the tests are skipped, unless ``tests.gpu.plan`` starts them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu.plan import RESULTS
from tests.gpu.small import Small, make_reference


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder as GPU tests, and skips them where they cannot run."""
    import torch

    started_by_plan = RESULTS in os.environ

    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not started_by_plan and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for results, traces, and the runs of the small model."""
    return Path(os.environ.get(RESULTS) or tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="session")
def small(results: Path, text_file: Path) -> Small:
    """A small model that was pruned and distilled on the CPU."""
    return make_reference(results, text_file)
