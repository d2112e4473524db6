"""Tests the rules of ``distill`` for loss, layer pairs and teacher, and the stage's result.

The teacher of ``chain`` has 4 layers.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launch.stages import with_shapes
from recipes.core.errors import RecipeError
from recipes.core.manifest import write_manifest
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Resources
from recipes.distillation.objective import layer_pairs
from recipes.distillation.results import CacheResult, DistillationResult
from recipes.distillation.settings import CacheLogitsConfig, DistillConfig
from recipes.planning.chain import Chain
from recipes.planning.hardware import Hardware
from recipes.pruning.settings import PruneConfig
from recipes.stages import cache_logits, distill
from tests.support.manifests import bare_manifest

if TYPE_CHECKING:
    from tests.unit.conftest import Compose, MakePlan

GPU = Hardware("h100", "gpu", memory_bytes=80e9)
SELECTIVE = {"recompute_granularity": "selective"}
NO_TEACHER = {"kd_weight": 0.0, "lm_weight": 1.0}
EARLY_STOP = {"stop_at_recovered": 0.9, "val_check_interval": 20}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0),
        # The cosine loss keeps 8 bytes for each pair of layers, the MSE loss 4. Without configured
        # pairs, all 4 layers are compared; with two pipeline stages, the 2 layers of the last one.
        ({"hidden_weight": 1.0}, 8 * 4),
        ({"hidden_weight": 1.0, "pipeline_model_parallel_size": 2}, 8 * 2),
        ({"hidden_weight": 1.0, "hidden_loss": "mse", "intermediate_layer_pairs": [[4, 4]]}, 4),
    ],
)
def test_planned_bytes_of_compared_hidden_states(
    chain: Chain, fields: dict[str, Any], expected: int
) -> None:
    """``expected`` is in bytes per token and channel."""
    workload = distill.workload(DistillConfig(stage="distill", **fields), chain)
    assert workload.hidden_state_bytes == expected


def test_the_workload_has_the_teacher_of_another_run(chain: Chain, tmp_path: Path) -> None:
    """As after a second pruning that distils from the model before the first one."""
    teacher = replace(chain.teacher, num_layers=8)
    manifest = bare_manifest("import_hf", "checkpoint_nemo", None)
    write_manifest(tmp_path, replace(manifest, architecture=teacher.as_dict()))
    inputs = {"teacher": str(tmp_path)}
    cfg = DistillConfig(stage="distill", inputs=inputs, hidden_weight=1.0)
    workload = distill.workload(cfg, chain)
    assert workload.teacher == teacher
    assert workload.trained == chain.teacher
    assert cache_logits.workload(CacheLogitsConfig(inputs=inputs), chain).teacher == teacher


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
        # An early stop needs a validation before the last step, and a live teacher's logits in it.
        (EARLY_STOP, []),
        ({**EARLY_STOP, "val_check_interval": 100}, ["stop"]),
        ({**EARLY_STOP, **NO_TEACHER, "hidden_weight": 1.0}, ["stop"]),
        ({**EARLY_STOP, **NO_TEACHER}, ["stop"]),
        ({**EARLY_STOP, "inputs": {"teacher": "cache_logits"}}, ["stop"]),
        ({**EARLY_STOP, "pipeline_model_parallel_size": 2}, ["stop"]),
        # One rank cannot be split into two pipeline stages. The rule of layouts reports it.
        ({"hidden_weight": 1.0, "pipeline_model_parallel_size": 2}, []),
    ],
)
def test_losses_and_early_stops_that_cannot_work_are_refused(
    chain: Chain, fields: dict[str, Any], expected: list[str]
) -> None:
    stages = {"cache_logits": CacheLogitsConfig(stage="cache_logits")}
    cfg = DistillConfig(stage="distill", **fields)
    problems = distill.check(cfg, replace(chain, stages=stages))
    assert [problem.rule.name for problem in problems] == expected


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
    compiler = "recipes.distillation.training.missing_compiler"
    monkeypatch.setattr(compiler, lambda: None)
    assert distill.STAGE.resolve_from_chain(cfg, chain).compile is expected
    # If the compiler is missing, only an explicit setting compiles.
    monkeypatch.setattr(compiler, lambda: ("g++", "install it"))
    assert distill.STAGE.resolve_from_chain(cfg, chain).compile is fields.get("compile", False)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[3, 4]], ""),  # no problem
        ([[3, 3]], ""),
        ([[2, 3]], "student's layers [2]"),
        ([[3, 2], [3, 4]], "teacher's layers [2]"),
        ([[3, 3], [3, 4]], "student's layers [3] several times"),
        ([[4, 4]], "student's layers [4]"),
        ([[0, 4]], "student's layers [0]"),
        ([[3]], "[[3]]"),
    ],
)
def test_layer_pairs_are_on_the_last_pipeline_stage(
    chain: Chain, pairs: list[list[int]], message: str
) -> None:
    """A pair is ``[student layer, teacher layer]``.

    The last of two pipeline stages has layer 3 of the student's 3, and layers 3 and 4 of the
    teacher's 4.
    """
    student = PruneConfig(stage="prune", target_num_layers=3)
    cfg = DistillConfig(
        stage="distill",
        inputs={"student": "prune"},
        resources=Resources(devices=2),
        pipeline_model_parallel_size=2,
        hidden_pipeline_stages=2,
        hidden_weight=1.0,
        intermediate_layer_pairs=pairs,
    )
    stages = {"prune": student, "distill": cfg}
    chain = with_shapes(replace(chain, stages=stages), stages)
    text = "\n".join(problem.what for problem in distill.check(cfg, chain))
    assert message in text
    assert bool(text) == bool(message)


@pytest.mark.parametrize(("pairs", "rule"), [([], "hidden-range"), ([[1, 1]], "hidden-pairs")])
@pytest.mark.parametrize(
    ("hardware", "cost"), [(GPU, "hours instead of"), (replace(GPU, memory_bytes=1), "fits into")]
)
def test_reason_and_cost_of_comparing_all_layers_are_named(
    chain: Chain, pairs: list[list[int]], rule: str, hardware: Hardware, cost: str
) -> None:
    """With pipeline parallelism, ModelOpt can compare only layers on the last stage.

    The fix is to use one stage. It names the hours, or says that no layout fits into the memory.
    """
    cfg = DistillConfig(
        stage="distill",
        resources=Resources(devices=2),
        pipeline_model_parallel_size=2,
        hidden_weight=1.0,
        intermediate_layer_pairs=pairs,
    )
    chain = replace(chain, hardware=hardware)
    # With pairs, there is a problem for the student and one for the teacher.
    problem, *_ = (p for p in distill.check(cfg, chain) if p.rule.name == rule)
    assert "ModelOpt" in problem.what
    assert cost in problem.fix


def test_default_pairs_are_the_layers_that_pruning_kept() -> None:
    """Arguments: settings, layers that the student kept, and both models' numbers of layers."""
    assert layer_pairs(DistillConfig(), [1, 3, 6], 3, 6) == [(1, 1), (2, 3), (3, 6)]
    assert layer_pairs(DistillConfig(), None, 2, 2) == [(1, 1), (2, 2)]
    # With two pipeline stages, both layers of a pair must be on the last stage.
    pipeline = DistillConfig(pipeline_model_parallel_size=2)
    assert layer_pairs(pipeline, [1, 3, 4, 6], 4, 6) == [(3, 4), (4, 6)]
    # Layer 3 of the teacher is on the first stage.
    assert layer_pairs(pipeline, [1, 2, 3, 6], 4, 6) == [(4, 6)]
    assert layer_pairs(DistillConfig(hidden_pipeline_stages=2), [1, 2, 3, 6], 4, 6) == [(4, 6)]
    # A teacher that was itself pruned: its sixth layer is the original layer 9.
    teacher_kept = [1, 2, 3, 4, 5, 9, 10, 11, 12]
    assert layer_pairs(pipeline, [1, 2, 3, 9, 10], 5, 9, teacher_kept) == [(4, 6), (5, 7)]
    # Teachers of five layers without the student's layer 9: a pruned and an unpruned one.
    for kept_without_9 in ([1, 2, 3, 4, 5], None):
        with pytest.raises(RecipeError, match=r"layers \[9\]"):
            layer_pairs(DistillConfig(), [1, 9], 2, 5, kept_without_9)
    explicit = DistillConfig(intermediate_layer_pairs=[[2, 5]])
    assert layer_pairs(explicit, [1, 3, 6], 3, 6) == [(2, 5)]
    # The student's layers are not known, or no pair is on the last stage of both models.
    for student_kept in (None, [1, 2, 3]):
        with pytest.raises(RecipeError, match="set intermediate_layer_pairs"):
            layer_pairs(pipeline, student_kept, 3, 6)


@pytest.mark.parametrize(
    ("settings", "cache_settings", "message"),  # no message: no problem
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
        ({"seed": 5}, {}, None),  # the cache has the whole text
        ({"seed": 5}, {"num_sequences": 9}, "seed=5"),
        ({"weights": {"a": 1}}, {"num_sequences": 9, "weights": {"a": 2}}, "weights="),
    ],
)
def test_a_cached_teacher_must_match_the_distillation(
    chain: Chain,
    tmp_path: Path,
    settings: dict[str, Any],
    cache_settings: dict[str, Any],
    message: str | None,
) -> None:
    """Tests a teacher that this run caches, and a teacher that another run has cached."""
    cache = CacheLogitsConfig(stage="cache_logits", **cache_settings)
    result = CacheResult(cache.num_sequences or 4000, 4000, 0, 0, 0.0, 0.0)
    manifest = replace(bare_manifest("cache_logits", "logit_cache", result), config=asdict(cache))
    write_manifest(tmp_path, manifest)
    for teacher in ("cache_logits", str(tmp_path)):
        cfg = DistillConfig(stage="distill", inputs={"teacher": teacher}, **settings)
        chain = replace(chain, stages={"cache_logits": cache, "distill": cfg})
        problems = [p.what for p in distill.check(cfg, chain) if p.rule.name == "cached-teacher"]
        if message is None:
            assert problems == []
        else:
            [problem] = problems
            assert message in problem
        assert distill.workload(cfg, chain).teacher is None  # it does not run


@pytest.mark.parametrize(
    ("experts", "fields", "fix"),  # no fix: no problem
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
    """``recompute_modules`` has an effect only with selective recomputation."""
    moe = {"moe_router_topk": 2, "moe_ffn_hidden_size": 32} if experts else {}
    teacher = replace(chain.teacher, num_moe_experts=experts, **moe)
    on_gpu = replace(chain, teacher=teacher, hardware=GPU)
    problems = list(distill.check(DistillConfig(**fields), on_gpu))
    assert [(p.rule.name, p.fix) for p in problems] == ([("recompute", fix)] if fix else [])


def test_the_result_covers_all_starts(tmp_path: Path) -> None:
    """A restart after the last step trains nothing, so the records of earlier starts must count.

    Here, a restart repeats step 2, and step 4 is skipped. A step has 2 sequences of 8 tokens.
    """
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
        tokens_per_second=27.5,  # median of 40, 25, 20 and 30: the last record of each step
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
    """A token has ``top_k`` ids and ``top_k`` + 1 log-probabilities. Each takes two bytes.

    That is 130 bytes for ``top_k=32``. The size is 0 if the number of sequences is not known.
    """
    assert cache_logits.disk_bytes(CacheLogitsConfig(**settings), chain) == expected


def test_progress_of_a_cache_counts_complete_shards(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    # Files are added one by one. ``progress`` is that after the file is added.
    for name, progress in (
        (".shard_00001.safetensors.7.partial", None),  # an incomplete shard
        ("shard_00000.safetensors", "1 shard"),
        ("shard_00001.safetensors", "2 shards"),
    ):
        (shards / name).touch()
        assert cache_logits.progress(tmp_path) == progress


@pytest.mark.parametrize("teacher", ["cached", "corrected_cached"])
def test_a_cached_teacher_has_the_settings_of_distill(
    teacher: str, compose: Compose, plan: MakePlan
) -> None:
    overrides = (f"teacher={teacher}", "stages.distill.temperature=2.5")
    stages = compose("recipe=llama_depth_prune", *overrides).stages
    cache, training = stages.cache_logits, stages.distill
    assert (cache.temperature, cache.seed) == (2.5, training.seed)
    assert cache.num_sequences >= training.max_steps * training.global_batch_size
    names = [stage.name for stage in plan(*overrides).stages]
    assert names.index("cache_logits") < names.index("distill")
