from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from recipes.distill import Config
from recipes.parallelism import data_parallel_size, layout_problems
from recipes.preflight import Chain
from recipes.stage import Resources

if TYPE_CHECKING:
    from recipes.architecture import Architecture


def config(devices: int = 1, nodes: int = 1, tp: int = 1, pp: int = 1, **fields: Any) -> Config:
    return Config(
        stage="distill",
        resources=Resources(nodes=nodes, devices=devices),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        **fields,
    )


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
def test_data_parallel_size(cfg: Config, size: int) -> None:
    assert data_parallel_size(cfg) == size


@pytest.mark.parametrize(
    "cfg",
    [
        config(),
        config(devices=2, tp=2),
        config(devices=2, pp=2),
        config(devices=4, nodes=2, global_batch_size=32),
        config(global_batch_size=12),
    ],
)
def test_layouts_that_fit(cfg: Config, chain: Chain) -> None:
    assert list(layout_problems(cfg, chain)) == []


@pytest.mark.parametrize(
    ("cfg", "rule", "what", "fix"),
    [
        (config(devices=3, tp=2), "ranks", "3 rank(s) cannot be split into TP=2 x PP=1", "of 2"),
        (config(tp=2, pp=2), "ranks", "1 rank(s)", "a multiple of 4"),
        (config(global_batch_size=6), "batch", "global_batch_size=6 is not", "multiple of 4"),
        (config(devices=4), "batch", "DP=4 x micro_batch_size=4", "multiple of 16"),
        (config(devices=3, pp=3), "pipeline-parallel", "4 layers are not divisible by PP=3", "pip"),
    ],
)
def test_each_rule(cfg: Config, rule: str, what: str, fix: str, chain: Chain) -> None:
    [problem] = layout_problems(cfg, chain)
    assert problem.rule == rule
    assert what in problem.what
    assert fix in problem.fix


@pytest.mark.parametrize(
    ("axis", "size"),
    [
        ("num_attention_heads", 9),
        ("num_query_groups", 1),
        ("ffn_hidden_size", 255),
        ("vocab_size", 513),
    ],
)
def test_tensor_parallel_axes(teacher: Architecture, axis: str, size: int) -> None:
    chain = Chain("x", dataclasses.replace(teacher, **{axis: size}), {})
    [problem] = layout_problems(config(devices=2, tp=2), chain)
    assert problem.rule == "tensor-parallel"
    assert f"{axis}={size} is not divisible by TP=2" in problem.what


@pytest.mark.parametrize(
    "fields", [{"micro_batch_size": 0}, {"tp": 0}, {"pp": 0}, {"global_batch_size": 0}]
)
def test_sizes_of_zero_are_refused(fields: dict[str, int], chain: Chain) -> None:
    assert list(layout_problems(config(**fields), chain))
