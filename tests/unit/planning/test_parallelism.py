"""Checks of Megatron's parallel sizes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from launch.plan import with_shapes
from recipes.core.stage import Resources
from recipes.distillation.settings import DistillConfig
from recipes.planning.chain import Chain
from recipes.planning.layouts import layout_problems
from recipes.planning.rules import Problem
from recipes.pruning.settings import PruneConfig
from recipes.stages import distill

if TYPE_CHECKING:
    from nemo_convert.architecture import Architecture


def config(
    devices: int = 1, nodes: int = 1, tp: int = 1, pp: int = 1, **fields: Any
) -> DistillConfig:
    return DistillConfig(
        stage="distill",
        resources=Resources(nodes=nodes, devices=devices),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        **fields,
    )


def problems(cfg: DistillConfig, chain: Chain) -> list[Problem]:
    return list(layout_problems(distill.workload(cfg, chain), chain.hardware))


@pytest.mark.parametrize(
    "cfg",
    [
        config(),
        config(devices=4, nodes=2, global_batch_size=32),
        config(devices=3, pp=3),
        config(devices=2, tp=2, sequence_parallel=True),
        config(devices=2, tp=2, seq_length=255),
    ],
)
def test_layouts_that_fit(cfg: DistillConfig, chain: Chain) -> None:
    assert problems(cfg, chain) == []


@pytest.mark.parametrize(
    ("cfg", "rule", "what", "fix"),
    [
        (config(devices=3, tp=2), "ranks", "3 rank(s) cannot be split into TP=2 x PP=1", "of 2"),
        (config(tp=2, pp=2), "ranks", "1 rank(s)", "a multiple of 4"),
        (config(global_batch_size=6), "batch", "global_batch_size=6 is not", "multiple of 4"),
        (config(devices=4), "batch", "DP=4 x micro_batch_size=4", "multiple of 16"),
        (config(devices=5, pp=5), "pipeline-parallel", "teacher has 4 layers, fewer", "most 4"),
        (
            config(devices=2, tp=2, sequence_parallel=True, seq_length=255),
            "sequence-parallel",
            "seq_length=255 is not divisible by TP=2",
            "sequence_parallel=false",
        ),
    ],
)
def test_each_rule(cfg: DistillConfig, rule: str, what: str, fix: str, chain: Chain) -> None:
    [problem] = problems(cfg, chain)
    assert problem.rule.name == rule
    assert what in problem.what
    assert fix in problem.fix


@pytest.mark.parametrize(
    ("axis", "size", "rule"),
    [
        ("num_attention_heads", 9, "tensor-parallel"),
        ("num_query_groups", 1, "tensor-parallel"),
        ("ffn_hidden_size", 255, "tensor-parallel"),
        ("vocab_size", 513, "vocabulary"),
    ],
)
def test_tensor_parallel_axes(teacher: Architecture, axis: str, size: int, rule: str) -> None:
    chain = Chain("x", dataclasses.replace(teacher, **{axis: size}), {})
    [problem] = problems(config(devices=2, tp=2), chain)
    assert problem.rule.name == rule
    assert f"{axis}={size} is not divisible by TP=2" in problem.what


def test_student_and_teacher_are_both_checked(chain: Chain) -> None:
    student = PruneConfig(stage="prune", target_num_layers=2)
    whole = with_shapes(dataclasses.replace(chain, stages={"prune": student}), ["prune"])
    cfg = config(devices=5, pp=5)
    cfg.inputs = {"teacher": "import_hf", "student": "prune"}
    whats = [problem.what for problem in problems(cfg, whole)]
    assert whats == [
        "the teacher has 4 layers, fewer than PP=5",
        "the student has 2 layers, fewer than PP=5",
    ]


def test_experts_are_trained_with_sequence_parallelism(chain: Chain) -> None:
    """Their own width must divide, not the one that dense layers would have."""
    experts = dataclasses.replace(
        chain.teacher, num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=66
    )
    moe = dataclasses.replace(chain, teacher=experts)
    [problem] = problems(config(devices=2, tp=2), moe)
    assert "sequence_parallel=true" in problem.fix
    whole = config(devices=2, tp=2, sequence_parallel=True)
    assert problems(whole, moe) == []
    odd = dataclasses.replace(experts, moe_ffn_hidden_size=65)
    [problem] = problems(whole, dataclasses.replace(moe, teacher=odd))
    assert "moe_ffn_hidden_size=65" in problem.what
