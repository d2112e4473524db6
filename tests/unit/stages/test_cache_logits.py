"""What can be said about caching a teacher before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from recipes.core.stage import Resources
from recipes.distillation.settings import CacheLogitsConfig
from recipes.stages.cache_logits import STAGE, disk_bytes, progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from launch.plan import Plan
    from recipes.planning.chain import Chain

TEACHERS = {
    "live": [],
    "cached": ["cache_logits"],
    "corrected": ["correct_teacher"],
    "corrected_cached": ["correct_teacher", "cache_logits"],
}


def test_the_defaults_are_accepted(chain: Chain) -> None:
    assert list(STAGE.problems(CacheLogitsConfig(), chain)) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"top_k": 512}, "top_k=512 leaves nothing of the vocabulary of 512"),
        ({"seq_length": 1025}, "seq_length=1025"),
        ({"tensor_model_parallel_size": 2}, "cannot be split into TP=2"),
        (
            {"tensor_model_parallel_size": 3, "resources": Resources(devices=3)},
            "num_attention_heads=8 is not divisible by TP=3",
        ),
    ],
)
def test_each_problem_is_named(settings: dict[str, Any], says: str, chain: Chain) -> None:
    assert any(
        says in str(problem) for problem in STAGE.problems(CacheLogitsConfig(**settings), chain)
    )


def test_ranks_left_over_share_the_windows(chain: Chain) -> None:
    cfg = CacheLogitsConfig(
        tensor_model_parallel_size=2, resources=Resources(devices=8), micro_batch_size=3
    )
    assert list(STAGE.problems(cfg, chain)) == []


def test_size_on_disk(chain: Chain) -> None:
    """32 ids of two bytes, and 33 log-probabilities of two bytes, for every token."""
    assert (
        disk_bytes(CacheLogitsConfig(top_k=32, num_windows=10, seq_length=100), chain) == 130 * 1000
    )
    assert disk_bytes(CacheLogitsConfig(top_k=128, num_windows=1, seq_length=1), chain) == 514
    assert disk_bytes(CacheLogitsConfig(), chain) == 0


def test_progress_counts_whole_shards(tmp_path: Path) -> None:
    assert progress(tmp_path) is None
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / ".shard_00001.safetensors.7.partial").touch()
    assert progress(tmp_path) is None
    (shards / "shard_00000.safetensors").touch()
    assert progress(tmp_path) == "1 shard"
    (shards / "shard_00001.safetensors").touch()
    assert progress(tmp_path) == "2 shards"


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("recipe", ["llama_depth_prune", "llama_width_prune"])
def test_the_teacher_is_chosen_on_the_command_line(
    recipe: str, teacher: str, compose: Callable[..., Any]
) -> None:
    cfg = compose(f"recipe={recipe}", f"teacher={teacher}", "stages.distill.temperature=2.5")
    added = [name for name in cfg.stages if name in ("correct_teacher", "cache_logits")]
    assert added == TEACHERS[teacher]
    assert cfg.stages.distill.inputs.teacher == (added or ["import_hf"])[-1]
    if "cache_logits" in added:
        expected = "correct_teacher" if "correct_teacher" in added else "import_hf"
        assert cfg.stages.cache_logits.inputs.teacher == expected
        assert cfg.stages.cache_logits.temperature == 2.5
        assert cfg.stages.cache_logits.seed == cfg.stages.distill.seed


def test_a_cached_teacher_is_planned_before_distillation(plan: Callable[..., Plan]) -> None:
    names = [stage.name for stage in plan("teacher=cached").stages]
    assert names.index("cache_logits") < names.index("distill")


def test_the_default_cache_covers_the_default_budget(compose: Callable[..., Any]) -> None:
    stages = compose("recipe=llama_width_prune", "teacher=cached").stages
    budget = stages.distill.max_steps * stages.distill.global_batch_size
    assert stages.cache_logits.num_windows >= budget
