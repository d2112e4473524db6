"""The command ``rehearse=RANKS``: what it prints and how it ends."""

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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with(tmp_path_factory.mktemp("checkout"))


def test_sound_ranks_are_shown_with_their_memory(checkout: Path) -> None:
    done = run(checkout, *COMMAND)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2/2 distill, rank 1 of 8: done in" in done.stdout
    assert "Memory at the peak, GB: rehearsed / planned" in done.stdout


def test_a_rank_that_skips_a_collective_is_a_mistake(checkout: Path) -> None:
    module = checkout / "recipes" / "distillation" / "vocabulary.py"
    source = module.read_text()
    module.write_text(source + DEFECT)
    try:
        done = run(checkout, *COMMAND)
    finally:
        module.write_text(source)
    assert done.returncode == 1
    assert "TENSOR_MODEL_PARALLEL_GROUP" in done.stdout
    assert "error: the rehearsal found" in done.stdout + done.stderr
