"""The rules of ``distill``: its loss, its pairs of layers, its cached teacher, and its figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.core.constraints import violations
from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Resources
from recipes.distillation.objective import layer_pairs
from recipes.distillation.results import DistillationResult
from recipes.distillation.settings import CacheLogitsConfig, DistillConfig
from recipes.planning.chain import Chain
from recipes.planning.hardware import Hardware
from recipes.pruning.settings import PruneConfig
from recipes.stages import distill

DELAYED = {"fp8_recipe": "delayed", "first_last_layers_bf16": False}
SELECTIVE = {"recompute_granularity": "selective"}
ALONE = {"kd_weight": 0.0, "lm_weight": 1.0}


def rules(cfg: DistillConfig, chain: Chain) -> list[str]:
    return [problem.rule.name for problem in distill.check(cfg, chain)]


def test_a_loss_has_a_term(chain: Chain) -> None:
    assert rules(DistillConfig(kd_weight=0.0), chain) == ["loss"]


@pytest.mark.parametrize("fields", [{"kd_weight": 0.0, "lm_weight": 1.0}, {"hidden_weight": 2.0}])
def test_any_term_may_be_alone_or_with_others(chain: Chain, fields: dict[str, float]) -> None:
    assert rules(DistillConfig(**fields), chain) == []


@pytest.mark.parametrize(
    ("fields", "place", "expected"),
    [
        ({"max_steps": 100}, {"runs_here": True}, True),
        ({"max_steps": 99}, {"runs_here": True}, False),
        ({"max_steps": 99, "compile": True}, {}, True),
        ({"max_steps": 100, "compile": False}, {"runs_here": True}, False),
        ({"max_steps": 100}, {}, False),
        ({"max_steps": 100}, {"runs_here": True, "hardware": Hardware(kind="gpu")}, False),
    ],
)
def test_compiles_where_it_pays(
    chain: Chain,
    fields: dict[str, Any],
    place: dict[str, Any],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recipes.distillation.training.missing_compiler", lambda: None)
    resolve = distill.STAGE.resolve_from_chain
    assert resolve(DistillConfig(**fields), replace(chain, **place)).compile is expected
    missing = ("g++", "install it")
    monkeypatch.setattr("recipes.distillation.training.missing_compiler", lambda: missing)
    found = resolve(DistillConfig(**fields), replace(chain, **place)).compile
    assert found is bool(fields.get("compile"))


def on_two_stages(chain: Chain, pairs: list[list[int]]) -> tuple[DistillConfig, Chain]:
    """A student of 3 of the teacher's 4 layers; the last stages have 1 and 2 of them."""
    student = PruneConfig(stage="prune", target_num_layers=3)
    cfg = DistillConfig(
        stage="distill",
        inputs={"student": "prune"},
        resources=Resources(devices=2),
        pipeline_model_parallel_size=2,
        intermediate_layer_pairs=pairs,
    )
    return cfg, Chain(chain.hf_path, chain.teacher, {"prune": student, "distill": cfg})


@pytest.mark.parametrize(
    ("pairs", "named"),
    [
        ([[3, 4]], ""),
        ([[3, 3]], ""),
        ([[2, 3]], "student's layers [2]; its last pipeline stage, where the loss is, has 3 to 3"),
        ([[3, 2], [3, 4]], "teacher's layers [2]; its last pipeline stage, where the loss is, has"),
        ([[4, 4]], "student's layers [4]"),
        ([[0, 4]], "student's layers [0]"),
        ([[3]], "not a list of [student, teacher] layers"),
    ],
)
def test_pairs_are_on_the_last_pipeline_stage(
    chain: Chain, pairs: list[list[int]], named: str
) -> None:
    found = "\n".join(problem.what for problem in distill.check(*on_two_stages(chain, pairs)))
    assert named in found
    assert bool(found) == bool(named)


def test_pairs_follow_the_layers_that_were_kept() -> None:
    assert layer_pairs(DistillConfig(), [1, 3, 6], 3, 6) == [(1, 1), (2, 3), (3, 6)]
    two = DistillConfig(pipeline_model_parallel_size=2)
    assert layer_pairs(two, [1, 3, 4, 6], 4, 6) == [(3, 4), (4, 6)]
    assert layer_pairs(two, [1, 2, 3, 6], 4, 6) == [(4, 6)]
    given = DistillConfig(intermediate_layer_pairs=[[2, 5]])
    assert layer_pairs(given, [1, 3, 6], 3, 6) == [(2, 5)]


def test_pairs_of_a_model_that_was_only_narrowed() -> None:
    assert layer_pairs(DistillConfig(), None, 2, 2) == [(1, 1), (2, 2)]


@pytest.mark.parametrize("kept", [None, [1, 2, 3]])
def test_pairs_that_cannot_be_derived(kept: list[int] | None) -> None:
    cfg = DistillConfig(pipeline_model_parallel_size=2)
    with pytest.raises(RecipeError, match="set intermediate_layer_pairs"):
        layer_pairs(cfg, kept, 3, 6)


STOP = {"stop_at_recovered": 0.9, "val_check_interval": 20}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (STOP, None),
        ({**STOP, "val_check_interval": 100}, "no validation before the last"),
        ({**STOP, "kd_weight": 0.0, "hidden_weight": 1.0}, "a loss on its logits"),
        ({**STOP, **ALONE}, "none beside the student"),
        ({**STOP, "inputs": {"teacher": "cache_logits"}}, "none beside the student"),
        ({**STOP, "pipeline_model_parallel_size": 2}, "pass the student alone"),
    ],
)
def test_what_a_training_stops_by(chain: Chain, fields: dict[str, Any], said: str | None) -> None:
    cached = {"cache_logits": CacheLogitsConfig(stage="cache_logits")}
    cfg, whole = DistillConfig(stage="distill", **fields), replace(chain, stages=cached)
    found = [p.what for p in distill.check(cfg, whole) if p.rule.name == "stop"]
    assert len(found) == (said is not None)
    assert (said or "") in "".join(found)


@pytest.mark.parametrize("share", [float("nan"), 0.0, 1.0, 1.5, -0.5, float("inf")])
def test_a_share_to_stop_at_leaves_a_rest(share: float) -> None:
    assert list(violations(DistillConfig(stage="distill", stop_at_recovered=share)))


@pytest.mark.parametrize(
    ("ours", "cached", "named"),
    [
        ({}, {}, None),
        ({"top_k": 64}, {}, None),
        ({"temperature": 2.0}, {}, "temperature=2.0, but the cached teacher's is 1.0"),
        ({"seq_length": 128}, {}, "seq_length=128"),
        ({"top_k": 32}, {}, "top_k=32, but the cached teacher's is 64"),
        (
            {"logits_loss": "jsd"},
            {"tail_draws": 4},
            "logits_loss=jsd, but the cached teacher's tail",
        ),
        ({}, {"tail_draws": 4}, None),
        ({"hidden_weight": 1.0}, {}, "no hidden states"),
        ({}, {"seq_length": 64}, "seq_length=256, but the cached teacher's is 64"),
    ],
)
def test_a_cached_teacher_fits_the_training(
    chain: Chain, ours: dict[str, Any], cached: dict[str, Any], named: str | None
) -> None:
    cache = CacheLogitsConfig(stage="cache_logits", **cached)
    cfg = DistillConfig(stage="distill", inputs={"teacher": "cache_logits"}, **ours)
    whole = Chain(chain.hf_path, chain.teacher, {"cache_logits": cache, "distill": cfg})
    found = [problem.what for problem in distill.check(cfg, whole)]
    assert len(found) == (named is not None)
    assert (named or "") in "".join(found)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"tp_comm_overlap": True, "tensor_model_parallel_size": 1},
            "tensor_model_parallel_size=1",
        ),
        ({"tp_comm_overlap": True}, "a teacher beside the student"),
        ({"tp_comm_overlap": True, **ALONE}, None),
        ({"fp8_teacher": True}, "fp8=None"),
        ({"fp8_teacher": True, "fp8": "hybrid"}, None),
        ({"fp8_teacher": True, "fp8": "hybrid", **DELAYED}, "fp8_recipe=delayed"),
        ({"fp8_teacher": True, "fp8": "hybrid", **ALONE}, "no teacher beside the student"),
        ({"cuda_graphs": True}, None),
        ({"cuda_graphs": True, "recompute_granularity": "selective"}, "=selective"),
        ({"cuda_graphs": True, "hidden_weight": 1.0}, "no hidden states"),
        ({"recompute_modules": ["core_attn", "mlp"], **SELECTIVE}, None),
        ({"recompute_modules": ["moe"], **SELECTIVE}, "of this model is mlp"),
        ({"recompute_modules": ["moe"]}, None),
    ],
)
def test_what_only_some_trainings_on_gpus_can(
    chain: Chain, fields: dict[str, Any], said: str | None
) -> None:
    on_gpu = replace(chain, hardware=Hardware("h100", "gpu", memory_bytes=80e9))
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    found = [problem.what for problem in distill.check(DistillConfig(**split | fields), on_gpu)]
    assert bool(found) == (said is not None)
    assert (said or "") in "\n".join(found)


def test_experts_are_not_captured(chain: Chain) -> None:
    experts = replace(chain.teacher, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32)
    on_gpu = replace(chain, teacher=experts, hardware=Hardware("h100", "gpu", memory_bytes=80e9))
    [problem] = distill.check(DistillConfig(cuda_graphs=True), on_gpu)
    assert problem.rule.name == "cuda-graphs"
    assert "experts" in problem.what


def test_experts_are_computed_again_by_their_own_name(chain: Chain) -> None:
    experts = replace(chain.teacher, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32)
    of_experts = replace(chain, teacher=experts)
    cfg = DistillConfig(**SELECTIVE, recompute_modules=["moe"])
    assert list(distill.check(cfg, of_experts)) == []
    [problem] = distill.check(replace(cfg, recompute_modules=["mlp"]), of_experts)
    assert problem.fix == "recompute_modules=[moe]"


def test_summary_is_that_of_all_attempts(tmp_path: Path) -> None:
    """Killed after its last step, a run resumes with nothing left to do, and still has figures."""
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
        tokens_per_second=27.5,
    )
