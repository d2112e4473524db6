"""Tests the losses of a mixture of experts in parallel layouts, and resumption in another."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.core.manifest import WORK
from recipes.core.metrics import METRICS
from recipes.distillation.training import CHECKPOINTS, complete_checkpoints
from tests.support.in_process import run_in_process, run_successfully
from tests.support.launcher import run_and_kill
from tests.support.layouts import (
    CHECKPOINT_INTERVAL,
    layout_overrides,
    overrides,
    perturbed_logits,
    require_same_training,
)
from tests.support.models import EVEN, write_tiny_model
from tests.support.runs import copy_without

LAYOUTS = {
    "EP=2": (2, "expert_model_parallel_size=2"),
    # Each expert has two replicas, whose gradients are added. Other weights have four.
    "EP=2, DP=4": (4, "expert_model_parallel_size=2"),
    "TP=2": (2, "tensor_model_parallel_size=2 sequence_parallel=true"),
}
"""Number of ranks, and settings of ``distill``, by name of the layout."""


@pytest.fixture(scope="module")
def command(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides of a run on one rank, without its directory."""
    model = tmp_path_factory.mktemp("moe") / "model"
    write_tiny_model(model, text_file, "qwen3_moe", **EVEN)
    # With this seed, the teacher is better than chance on the first micro batch of every rank.
    return [*overrides(model, text_file, Path("run")), "stages.distill.seed=2"]


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


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_losses_of_one_rank(
    one_rank: Path, perturbed: Path, command: list[str], tmp_path: Path, name: str
) -> None:
    copy_without(one_rank, tmp_path / "run", "distill")
    run_successfully(*command, *layout_overrides(*LAYOUTS[name]), cwd=tmp_path)
    require_same_training(one_rank, perturbed, tmp_path / "run")


def test_a_killed_run_resumes_with_more_replicas_but_not_without_expert_parallelism(
    one_rank: Path, perturbed: Path, command: list[str], tmp_path: Path
) -> None:
    copy_without(one_rank, tmp_path / "run", "distill")
    metrics = tmp_path / "run" / "distill" / METRICS
    run_and_kill(
        *command,
        *layout_overrides(*LAYOUTS["EP=2"]),
        cwd=tmp_path,
        metrics=metrics,
        records=CHECKPOINT_INTERVAL + 2,
        ready=lambda: complete_checkpoints(metrics.parent / WORK / CHECKPOINTS),
    )
    for force in ((), ("force=[distill]",)):
        refused = run_in_process(*command, *force, cwd=tmp_path)
        assert refused.code == 1
        assert "cannot resume with 1: Megatron-Core has a second optimizer" in refused.output
        assert "fix: set stages.distill.expert_model_parallel_size=2, or delete" in refused.output
    more_replicas = layout_overrides(*LAYOUTS["EP=2, DP=4"])
    assert "resume" in run_successfully(*command, *more_replicas, cwd=tmp_path).output
    require_same_training(one_rank, perturbed, tmp_path / "run")
