"""Tests ``rehearse=RANKS``, which runs single ranks of a job without a GPU, on fake tensors.

The command prints the memory of these ranks, and fails if their communication differs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.core.files import REPO_ROOT
from tests.support.contributing import copy_with, run
from tests.support.runs import settings, tiny

DEFECT = """
_all_reduce = all_reduce
def all_reduce(*args, **kwargs):
    if torch.distributed.get_rank() == 0:
        _all_reduce(*args, **kwargs)
"""
"""Code to append to ``vocabulary.py``. With it, only rank 0 calls the module's all-reduces.
Ranks 0 and 1 are in one tensor-parallel group, so both should call them."""


@pytest.fixture(scope="module")
def command(
    even_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """The command that rehearses the distillation of a tiny model on two ranks."""
    folder = tmp_path_factory.mktemp("command")
    return [
        *("launch/run.py", "recipe=llama_depth_prune", "only=[distill]", "rehearse=[0,1]"),
        *tiny(even_llama, text_file, folder / "run"),
        *settings("distill", tensor_model_parallel_size=2, **{"resources.devices": 2}),
    ]


def test_memory_of_ranks_without_a_defect_is_printed(command: list[str]) -> None:
    process = run(REPO_ROOT, *command)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "2/2 distill, rank 1 of 2: done in" in process.stdout
    assert "Memory at the peak, GB: rehearsed / planned" in process.stdout


def test_the_command_fails_and_reports_a_rank_that_skips_a_collective(
    command: list[str], tmp_path: Path
) -> None:
    checkout = copy_with(tmp_path)
    with (checkout / "recipes" / "distillation" / "vocabulary.py").open("a") as module:
        module.write(DEFECT)
    process = run(checkout, *command)
    assert process.returncode == 1
    assert "TENSOR_MODEL_PARALLEL_GROUP" in process.stdout
    assert "error: the rehearsal found" in process.stdout + process.stderr
