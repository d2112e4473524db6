"""Tests ``rehearse=RANKS``, which runs single ranks of a job without a GPU, on fake tensors.

The command prints the memory of these ranks, and fails if their communication differs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.contributing import copy_with, run

COMMAND = ("launch/run.py", "recipe=llama3_1_8b_width_2.5b", "only=[distill]", "rehearse=[0,1]")
DEFECT = """
_all_reduce = all_reduce
def all_reduce(*args, **kwargs):
    if torch.distributed.get_rank() == 0:
        _all_reduce(*args, **kwargs)
"""
"""Code to append to ``vocabulary.py``. With it, only rank 0 calls the module's all-reduces.
Ranks 0 and 1 are in one tensor-parallel group, so both should call them."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the repository's packages, which a test can edit."""
    return copy_with(tmp_path_factory.mktemp("checkout"))


def test_memory_of_ranks_without_a_defect_is_printed(checkout: Path) -> None:
    process = run(checkout, *COMMAND)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "2/2 distill, rank 1 of 8: done in" in process.stdout
    assert "Memory at the peak, GB: rehearsed / planned" in process.stdout


def test_the_command_fails_and_reports_a_rank_that_skips_a_collective(checkout: Path) -> None:
    module = checkout / "recipes" / "distillation" / "vocabulary.py"
    source = module.read_text()
    module.write_text(source + DEFECT)
    try:
        process = run(checkout, *COMMAND)
    finally:
        module.write_text(source)
    assert process.returncode == 1
    assert "TENSOR_MODEL_PARALLEL_GROUP" in process.stdout
    assert "error: the rehearsal found" in process.stdout + process.stderr
