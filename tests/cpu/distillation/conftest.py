"""Fixtures: a pruned run, and reference runs of a module's fixture ``command``.

All runs are in the folder ``run`` of their working directory.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.in_process import run_successfully
from tests.support.layouts import perturbed_logits
from tests.support.runs import copy_without, settings, tiny


@pytest.fixture(scope="session")
def short_recipe(even_llama: Path, text_file: Path) -> list[str]:
    """The overrides of a run that prunes 4 layers to 2 and distils for 6 steps.

    The run saves a checkpoint after each step.
    """
    return [
        "recipe=llama_depth_prune",
        *tiny(even_llama, text_file, Path("run")),
        "stages.prune.target_num_layers=2",
        *settings("distill", precision=32, warmup_steps=1, max_steps=6, checkpoint_interval=1),
    ]


@pytest.fixture(scope="session")
def pruned_run(short_recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``short_recipe`` whose stages are complete up to pruning."""
    folder = tmp_path_factory.mktemp("pruned")
    run_successfully(*short_recipe, "only=[import_hf,prepare_data,score,prune]", cwd=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def one_rank(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: the run of a module's fixture ``command``, on one rank."""
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
