"""Tests the rules of ``distill`` for loss, layer pairs and teacher, and the stage's result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launch.plan import with_shapes
from recipes.core.errors import RecipeError
from recipes.core.manifest import write_manifest
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Resources
from recipes.distillation.objective import layer_pairs
from recipes.distillation.results import CacheResult, DistillationResult
from recipes.distillation.settings import CACHE_FIELDS, CacheLogitsConfig, DistillConfig
from recipes.planning.chain import Chain
from recipes.planning.hardware import Hardware
from recipes.pruning.settings import PruneConfig
from recipes.stages import cache_logits, distill
from tests.support.manifests import bare_manifest

if TYPE_CHECKING:
    from launch.plan import Plan

GPU = Hardware("h100", "gpu", memory_bytes=80e9)
SELECTIVE = {"recompute_granularity": "selective"}
NO_TEACHER = {"kd_weight": 0.0, "lm_weight": 1.0}
STOP = {"stop_at_recovered": 0.9, "val_check_interval": 20}
TEACHERS = {
    "live": [],
    "cached": ["cache_logits"],
    "corrected": ["correct_teacher"],
    "corrected_cached": ["correct_teacher", "cache_logits"],
}
"""For each choice of ``teacher=``: the stages that it adds to a recipe."""


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0),
        ({"hidden_weight": 1.0}, 8 * 4),  # cosine, 4 layers
        ({"hidden_weight": 1.0, "pipeline_model_parallel_size": 2}, 8 * 2),
        ({"hidden_weight": 1.0, "hidden_loss": "mse", "intermediate_layer_pairs": [[4, 4]]}, 4),
    ],
)
def test_planned_bytes_of_compared_hidden_states(
    chain: Chain, fields: dict[str, Any], expected: int
) -> None:
    planned = distill.workload(DistillConfig(stage="distill", **fields), chain)
    assert planned.hidden_state_bytes == expected


def rule_names(cfg: DistillConfig, chain: Chain) -> list[str]:
    return [problem.rule.name for problem in distill.check(cfg, chain)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kd_weight": 0.0}, ["loss"]),
        ({"kd_weight": 0.0, "hidden_weight": 1.0}, ["loss"]),
        (NO_TEACHER, []),
        ({"hidden_weight": 2.0}, []),
        ({"hidden_weight": 2.0, "recompute_granularity": "full"}, ["recompute"]),
        ({"student_steps": [1, 99]}, []),
        # Steps must increase and be below max_steps, 100.
        ({"student_steps": [100]}, ["student-steps"]),
        ({"student_steps": [20, 20]}, ["student-steps"]),
        ({"student_steps": [20, 10]}, ["student-steps"]),
        (STOP, []),
        ({**STOP, "val_check_interval": 100}, ["stop"]),
        ({**STOP, **NO_TEACHER, "hidden_weight": 1.0}, ["stop"]),
        ({**STOP, **NO_TEACHER}, ["stop"]),
        ({**STOP, "inputs": {"teacher": "cache_logits"}}, ["stop"]),
        ({**STOP, "pipeline_model_parallel_size": 2}, ["stop"]),
    ],
)
def test_loss_and_early_stop(chain: Chain, fields: dict[str, Any], expected: list[str]) -> None:
    stages = {"cache_logits": CacheLogitsConfig(stage="cache_logits")}
    cfg = DistillConfig(stage="distill", **fields)
    assert rule_names(cfg, replace(chain, stages=stages)) == expected


@pytest.mark.parametrize(
    ("fields", "chain_fields", "expected"),
    [
        # By default, trainings of at least 100 steps on this machine's CPU are compiled.
        ({"max_steps": 100}, {"runs_here": True}, True),
        ({"max_steps": 99}, {"runs_here": True}, False),
        ({"max_steps": 99, "compile": True}, {}, True),
        ({"max_steps": 100, "compile": False}, {"runs_here": True}, False),
        ({"max_steps": 100}, {}, False),
        ({"max_steps": 100}, {"runs_here": True, "hardware": Hardware(kind="gpu")}, False),
    ],
)
def test_distill_compiles_if_that_saves_time_and_a_compiler_is_installed(
    chain: Chain,
    fields: dict[str, Any],
    chain_fields: dict[str, Any],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg, chain = DistillConfig(**fields), replace(chain, **chain_fields)
    # If the compiler is missing, only an explicit setting compiles.
    for missing, compiles in ((None, expected), (("g++", "install it"), fields.get("compile"))):
        monkeypatch.setattr("recipes.distillation.training.missing_compiler", lambda m=missing: m)
        assert distill.STAGE.resolve_from_chain(cfg, chain).compile is bool(compiles)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([[3, 4]], ""),
        ([[3, 3]], ""),
        ([[2, 3]], "student's layers [2]"),
        ([[3, 2], [3, 4]], "teacher's layers [2]"),
        ([[4, 4]], "student's layers [4]"),
        ([[0, 4]], "student's layers [0]"),
        ([[3]], "[[3]]"),
    ],
)
def test_layer_pairs_are_on_the_last_pipeline_stage(
    chain: Chain, pairs: list[list[int]], words: str
) -> None:
    """The last of two pipeline stages has 1 of the student's 3 layers, and 2 of the teacher's 4."""
    student = PruneConfig(stage="prune", target_num_layers=3)
    cfg = DistillConfig(
        stage="distill",
        inputs={"student": "prune"},
        resources=Resources(devices=2),
        pipeline_model_parallel_size=2,
        intermediate_layer_pairs=pairs,
    )
    stages = {"prune": student, "distill": cfg}
    planned = with_shapes(replace(chain, stages=stages), stages)
    text = "\n".join(problem.what for problem in distill.check(cfg, planned))
    assert words in text
    assert bool(text) == bool(words)


@pytest.mark.parametrize(("pairs", "rule"), [([], "hidden-range"), ([[1, 1]], "hidden-pairs")])
@pytest.mark.parametrize(
    ("hardware", "cost"), [(GPU, "hours instead of"), (replace(GPU, memory_bytes=1), "fits into")]
)
def test_reason_and_cost_of_comparing_all_layers_are_named(
    chain: Chain, pairs: list[list[int]], rule: str, hardware: Hardware, cost: str
) -> None:
    cfg = DistillConfig(
        stage="distill",
        resources=Resources(devices=2),
        pipeline_model_parallel_size=2,
        hidden_weight=1.0,
        intermediate_layer_pairs=pairs,
    )
    planned = replace(chain, hardware=hardware)
    problem, *_ = (p for p in distill.check(cfg, planned) if p.rule.name == rule)
    assert "ModelOpt" in problem.what
    assert cost in problem.fix


def test_default_pairs_are_the_layers_that_pruning_kept() -> None:
    assert layer_pairs(DistillConfig(), [1, 3, 6], 3, 6) == [(1, 1), (2, 3), (3, 6)]
    assert layer_pairs(DistillConfig(), None, 2, 2) == [(1, 1), (2, 2)]
    # With two pipeline stages, both layers of a pair must be on the last stage.
    pipeline = DistillConfig(pipeline_model_parallel_size=2)
    assert layer_pairs(pipeline, [1, 3, 4, 6], 4, 6) == [(3, 4), (4, 6)]
    assert layer_pairs(pipeline, [1, 2, 3, 6], 4, 6) == [(4, 6)]
    assert layer_pairs(DistillConfig(hidden_pipeline_stages=2), [1, 2, 3, 6], 4, 6) == [(4, 6)]
    # A teacher that was itself pruned: its sixth layer is the original layer 9.
    teacher = [1, 2, 3, 4, 5, 9, 10, 11, 12]
    assert layer_pairs(pipeline, [1, 2, 3, 9, 10], 5, 9, teacher) == [(4, 6), (5, 7)]
    for lacking in (teacher[:5], None):  # a teacher without the student's layer 9
        with pytest.raises(RecipeError, match=r"layers \[9\]"):
            layer_pairs(DistillConfig(), [1, 9], 2, 5, lacking)
    explicit = DistillConfig(intermediate_layer_pairs=[[2, 5]])
    assert layer_pairs(explicit, [1, 3, 6], 3, 6) == [(2, 5)]
    for kept in (None, [1, 2, 3]):  # no pair is on the last stage of both models
        with pytest.raises(RecipeError, match="set intermediate_layer_pairs"):
            layer_pairs(pipeline, kept, 3, 6)


@pytest.mark.parametrize(
    ("settings", "cached", "words"),
    [
        ({}, {}, None),
        ({"top_k": 64}, {}, None),
        ({}, {"tail_draws": 4}, None),
        ({"temperature": 2.0}, {}, "temperature=2.0"),
        ({"seq_length": 128}, {}, "seq_length=128"),
        ({}, {"seq_length": 64}, "seq_length=64"),
        ({"top_k": 32}, {}, "top_k=32"),
        ({"logits_loss": "jsd"}, {"tail_draws": 4}, "logits_loss=jsd"),
        ({"hidden_weight": 1.0}, {}, "hidden_weight"),
        ({"context_parallel_size": 2}, {}, "context_parallel_size=2"),
    ],
)
def test_a_cached_teacher_must_match_the_distillation(
    chain: Chain,
    tmp_path: Path,
    settings: dict[str, Any],
    cached: dict[str, Any],
    words: str | None,
) -> None:
    """Tests a teacher that this run caches, and a teacher that another run has cached."""
    cache = CacheLogitsConfig(stage="cache_logits", **cached)
    config = {name: getattr(cache, name) for name in CACHE_FIELDS}
    result = CacheResult(4000, 4000, 0, 0, 0.0, 0.0)
    write_manifest(
        tmp_path, replace(bare_manifest("cache_logits", "logit_cache", result), config=config)
    )
    for teacher in ("cache_logits", str(tmp_path)):
        cfg = DistillConfig(stage="distill", inputs={"teacher": teacher}, **settings)
        planned = replace(chain, stages={"cache_logits": cache, "distill": cfg})
        problems = [p.what for p in distill.check(cfg, planned) if p.rule.name == "cached-teacher"]
        assert len(problems) == (words is not None)
        assert (words or "") in "".join(problems)
        assert distill.workload(cfg, planned).teacher is None


@pytest.mark.parametrize(
    ("experts", "fields", "fix"),
    [
        (0, {"recompute_modules": ["core_attn", "mlp"], **SELECTIVE}, None),
        (0, {"recompute_modules": ["moe"], **SELECTIVE}, "recompute_modules=[mlp]"),
        (0, {"recompute_modules": ["moe"]}, None),
        (4, {"recompute_modules": ["moe"], **SELECTIVE}, None),
        (4, {"recompute_modules": ["mlp"], **SELECTIVE}, "recompute_modules=[moe]"),
    ],
)
def test_recomputed_modules_exist_in_the_model(
    chain: Chain, experts: int, fields: dict[str, Any], fix: str | None
) -> None:
    moe = {"moe_router_topk": 2, "moe_ffn_hidden_size": 32} if experts else {}
    teacher = replace(chain.teacher, num_moe_experts=experts, **moe)
    on_gpu = replace(chain, teacher=teacher, hardware=GPU)
    problems = list(distill.check(DistillConfig(**fields), on_gpu))
    assert [(p.rule.name, p.fix) for p in problems] == ([("recompute", fix)] if fix else [])


def test_the_result_covers_all_starts(tmp_path: Path) -> None:
    """A restart after the last step trains nothing, so the records of earlier starts must count."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, kd in ((1, 4.0), (2, 3.0), (2, 2.5), (3, 2.0)):
        log.progress(
            "distill", step, 4, loss=kd, kd=kd, lm=0.0, teacher_loss=1.5, tokens_per_second=kd * 10
        )
    log.progress("distill", 4, 4, loss=1.0, kd=1.0, lm=0.0, skipped=True, tokens_per_second=30.0)
    log.progress("validate", 4, 4, val_loss=2.25)
    cfg = DistillConfig(stage="distill", global_batch_size=2, seq_length=8)
    assert distill.result(cfg, tmp_path / "metrics.jsonl") == DistillationResult(
        final_loss=1.0,
        final_kd=1.0,
        final_hidden=None,
        final_lm=0.0,
        teacher_loss=1.5,
        val_loss=2.25,
        steps=4,
        skipped_steps=1,
        tokens=64,
        tokens_per_second=27.5,  # median over the last record of each step
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 32, "num_sequences": 10, "seq_length": 100}, 130 * 1000),
        ({"top_k": 128, "num_sequences": 1, "seq_length": 1}, 514),
        ({}, 0),
    ],
)
def test_size_of_a_cache(chain: Chain, settings: dict[str, int], expected: int) -> None:
    """A token has ``top_k`` ids and ``top_k`` + 1 log-probabilities. Each takes two bytes."""
    assert cache_logits.disk_bytes(CacheLogitsConfig(**settings), chain) == expected


def test_progress_of_a_cache_counts_complete_shards(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, progress in (
        (".shard_00001.safetensors.7.partial", None),
        ("shard_00000.safetensors", "1 shard"),
        ("shard_00001.safetensors", "2 shards"),
    ):
        (shards / name).touch()
        assert cache_logits.progress(tmp_path) == progress


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_teacher_is_chosen_on_the_command_line(
    teacher: str, compose: Callable[..., Any], plan: Callable[..., Plan]
) -> None:
    cfg = compose(
        "recipe=llama_depth_prune", f"teacher={teacher}", "stages.distill.temperature=2.5"
    )
    added = [name for name in cfg.stages if name in ("correct_teacher", "cache_logits")]
    assert added == TEACHERS[teacher]
    assert cfg.stages.distill.inputs.teacher == (added or ["import_hf"])[-1]
    if "cache_logits" in added:
        cache = cfg.stages.cache_logits
        expected = "correct_teacher" if "correct_teacher" in added else "import_hf"
        assert cache.inputs.teacher == expected
        assert (cache.temperature, cache.seed) == (2.5, cfg.stages.distill.seed)
        distill = cfg.stages.distill
        assert cache.num_sequences >= distill.max_steps * distill.global_batch_size
        names = [stage.name for stage in plan(f"teacher={teacher}").stages]
        assert names.index("cache_logits") < names.index("distill")
