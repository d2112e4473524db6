"""Tests the losses of a mixture of experts in parallel layouts, and resumption in another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.in_process import run_in_process, run_successfully
from tests.support.layouts import (
    kill_after_checkpoint,
    layout_overrides,
    overrides,
    require_same_training,
)
from tests.support.models import EVEN, write_tiny_model
from tests.support.runs import copy_without

LAYOUTS = {
    "EP=2": layout_overrides(2, "expert_model_parallel_size=2"),
    # Each expert has two replicas, whose gradients are added. Other weights have four.
    "EP=2, DP=4": layout_overrides(4, "expert_model_parallel_size=2"),
    "TP=2": layout_overrides(2, "tensor_model_parallel_size=2 sequence_parallel=true"),
}
"""Overrides by name of the layout."""


@pytest.fixture(scope="module")
def command(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides of a run on one rank."""
    model = tmp_path_factory.mktemp("moe") / "model"
    write_tiny_model(model, text_file, "qwen3_moe", **EVEN)
    # With this seed, the teacher is better than chance on the first micro batch of every rank.
    return [*overrides(model, text_file), "stages.distill.seed=2"]


@pytest.mark.parametrize("name", ["EP=2", "TP=2"])
def test_every_layout_has_the_losses_of_one_rank(
    one_rank: Path, perturbed: Path, command: list[str], tmp_path: Path, name: str
) -> None:
    copy_without(one_rank, tmp_path / "run", "distill")
    run_successfully(*command, *LAYOUTS[name], cwd=tmp_path)
    require_same_training(one_rank, perturbed, tmp_path / "run")


def test_a_killed_run_resumes_with_more_replicas_but_not_without_expert_parallelism(
    one_rank: Path, perturbed: Path, command: list[str], tmp_path: Path
) -> None:
    copy_without(one_rank, tmp_path / "run", "distill")
    kill_after_checkpoint(*command, *LAYOUTS["EP=2"], cwd=tmp_path)
    for force in ((), ("force=[distill]",)):
        refused = run_in_process(*command, *force, cwd=tmp_path)
        assert refused.code == 1
        assert "cannot resume with 1: Megatron-Core has a second optimizer" in refused.output
        assert "fix: set stages.distill.expert_model_parallel_size=2, or delete" in refused.output
    resumed = run_successfully(*command, *LAYOUTS["EP=2, DP=4"], cwd=tmp_path)
    assert "resume" in resumed.output
    require_same_training(one_rank, perturbed, tmp_path / "run")
