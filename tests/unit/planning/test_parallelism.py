from __future__ import annotations

import dataclasses
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from nemo_convert.pipeline import last_stage_layers, pipeline_split
from recipes.core.stage import Resources
from recipes.distillation.settings import DistillConfig
from recipes.distillation.training import layout_of
from recipes.planning.chain import Chain
from recipes.planning.parallelism import layout_problems
from recipes.planning.problems import Problem
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
    return list(layout_problems(distill.workload(cfg, chain), chain))


@pytest.mark.parametrize(
    ("cfg", "size"),
    [
        (config(), 1),
        (config(devices=8), 8),
        (config(devices=8, tp=2), 4),
        (config(devices=4, nodes=2, tp=2, pp=2), 2),
        (config(devices=3, tp=2), 0),
        (config(devices=1, tp=2), 0),
    ],
)
def test_data_parallel_size(cfg: DistillConfig, size: int) -> None:
    assert layout_of(cfg).data == size


@pytest.mark.parametrize(
    "cfg",
    [
        config(),
        config(devices=2, tp=2),
        config(devices=2, pp=2),
        config(devices=4, nodes=2, global_batch_size=32),
        config(global_batch_size=12),
        config(devices=3, pp=3),
        config(devices=2, tp=2, sequence_parallel=True),
        config(sequence_parallel=True, seq_length=255),
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


def test_stage_without_a_student_is_checked_once(chain: Chain) -> None:
    """A stage that reads the teacher alone has no student input."""
    cfg = config(devices=5, pp=5)
    cfg.inputs = {"checkpoint": "import_hf", "data": "prepare_data"}
    [problem] = problems(cfg, chain)
    assert problem.what == "the teacher has 4 layers, fewer than PP=5"


def test_student_and_teacher_are_both_checked(chain: Chain) -> None:
    student = PruneConfig(stage="prune", target_num_layers=2)
    whole = dataclasses.replace(chain, stages={"prune": student})
    cfg = config(devices=5, pp=5)
    cfg.inputs = {"teacher": "import_hf", "student": "prune"}
    whats = [problem.what for problem in problems(cfg, whole)]
    assert whats == [
        "the teacher has 4 layers, fewer than PP=5",
        "the student has 2 layers, fewer than PP=5",
    ]


@pytest.mark.parametrize(
    ("layers", "stages", "split"),
    [
        (30, 1, [30]),
        (30, 3, [10, 10, 10]),
        (3, 2, [2, 1]),
        (30, 4, [7, 8, 8, 7]),
        (24, 7, [2, 4, 4, 4, 4, 4, 2]),
        (9, 8, [2, 1, 1, 1, 1, 1, 1, 1]),
        (5, 5, [1, 1, 1, 1, 1]),
    ],
)
def test_pipeline_splits(layers: int, stages: int, split: list[int]) -> None:
    assert pipeline_split(layers, stages) == split


def test_every_pipeline_split_can_be_built_and_is_lightest_at_the_end() -> None:
    for layers, stages in product(range(1, 130), range(1, 130)):
        if stages > layers:
            with pytest.raises(ValueError, match="cannot fill"):
                pipeline_split(layers, stages)
            continue
        split = pipeline_split(layers, stages)
        assert (len(split), sum(split)) == (stages, layers)
        assert 1 <= split[-1] == min(split)
        assert len(set(split[1:-1])) <= 1
        assert len(set(split)) == 1 or layers % stages
        most = -(-layers // stages)
        if layers - most * (stages - 2) >= 2:  # else the ends cannot make up for the middle
            assert max(split) == most


def test_layers_of_the_last_stage_end_with_the_last_layer() -> None:
    assert list(last_stage_layers(30, 4)) == [24, 25, 26, 27, 28, 29, 30]
    assert list(last_stage_layers(4, 1)) == [1, 2, 3, 4]
    assert list(last_stage_layers(4, 4)) == [4]


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
