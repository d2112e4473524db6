"""Fixtures: reference runs of the distillation in ``tests/support/layouts.py``.

A module that uses them has the fixture ``command``: the overrides of a run in the folder ``run``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.in_process import run_successfully
from tests.support.layouts import perturbed_logits
from tests.support.runs import copy_without


@pytest.fixture(scope="module")
def one_rank(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: the run on one rank."""
    folder = tmp_path_factory.mktemp("one")
    run_successfully(*command, cwd=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def perturbed(one_rank: Path, command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of ``one_rank``, but with the student's logits changed by one ulp in each step."""
    folder = tmp_path_factory.mktemp("perturbed")
    copy_without(one_rank, folder / "run", "distill")
    with perturbed_logits():
        run_successfully(*command, cwd=folder)
    return folder / "run"
