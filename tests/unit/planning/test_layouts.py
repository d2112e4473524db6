"""Tests the checks of layouts, their error messages, the teacher's config, and proposals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from launch.stages import with_shapes
from recipes.core.errors import RecipeError
from recipes.core.stage import Resources
from recipes.distillation.settings import DistillConfig
from recipes.planning.chain import Chain, read_chain
from recipes.planning.layouts import (
    cheapest_proposal,
    fits,
    layout_problems,
    proposals,
    workloads_on_all_layouts,
)
from recipes.planning.limits import layout_overrides
from recipes.planning.rules import Problem, Rule, refuse_errors
from recipes.planning.workload import Layout
from recipes.pruning.settings import PruneConfig
from recipes.stages import distill
from tests.unit.planning.models import H100, LLAMA, distillation, with_experts

if TYPE_CHECKING:
    from pathlib import Path

    from nemo_convert.architecture import Architecture


def config(
    devices: int = 1, nodes: int = 1, tp: int = 1, pp: int = 1, **fields: Any
) -> DistillConfig:
    """Returns settings of ``distill``; ``tp`` and ``pp`` are parallel sizes."""
    return DistillConfig(
        stage="distill",
        resources=Resources(nodes=nodes, devices=devices),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        **fields,
    )


def problems(cfg: DistillConfig, chain: Chain) -> list[Problem]:
    """Returns the problems of a distillation's layout. By default, the student is the teacher."""
    return list(layout_problems(distill.workload(cfg, chain), chain.hardware))


@pytest.mark.parametrize(
    "cfg",
    [
        config(),
        config(devices=4, nodes=2, global_batch_size=32),
        config(devices=3, pp=3),
        config(devices=2, tp=2, sequence_parallel=True),
        config(devices=2, tp=2, seq_length=255),  # without sequence parallelism
    ],
)
def test_a_valid_layout_has_no_problems(cfg: DistillConfig, chain: Chain) -> None:
    assert problems(cfg, chain) == []


@pytest.mark.parametrize(
    # ``what`` and ``fix`` are parts of the problem's texts. ``chain``'s teacher has 4 layers. The
    # default micro batch size and global batch size are 4.
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
def test_an_invalid_layout_has_one_problem_with_a_fix(
    cfg: DistillConfig, rule: str, what: str, fix: str, chain: Chain
) -> None:
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
def test_tensor_parallel_size_must_divide_each_axis(
    teacher: Architecture, axis: str, size: int, rule: str
) -> None:
    chain = Chain("x", replace(teacher, **{axis: size}), {})
    [problem] = problems(config(devices=2, tp=2), chain)
    assert problem.rule.name == rule
    assert f"{axis}={size} is not divisible by TP=2" in problem.what


def test_student_and_teacher_are_both_checked(chain: Chain) -> None:
    student = PruneConfig(stage="prune", target_num_layers=2)
    pruned_chain = with_shapes(replace(chain, stages={"prune": student}), ["prune"])
    cfg = config(devices=5, pp=5)  # more pipeline stages than layers
    cfg.inputs = {"teacher": "import_hf", "student": "prune"}
    messages = [problem.what for problem in problems(cfg, pruned_chain)]
    assert messages == [
        "the teacher has 4 layers, fewer than PP=5",
        "the student has 2 layers, fewer than PP=5",
    ]


def test_experts_with_tensor_parallelism_need_sequence_parallelism(chain: Chain) -> None:
    """At TP=2, the feed-forward width of an expert must also be even."""
    experts = replace(chain.teacher, num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=66)
    moe = replace(chain, teacher=experts)
    [problem] = problems(config(devices=2, tp=2), moe)
    assert "sequence_parallel=true" in problem.fix
    sequence_parallel = config(devices=2, tp=2, sequence_parallel=True)
    assert problems(sequence_parallel, moe) == []
    four_ranks = replace(
        sequence_parallel,
        resources=Resources(devices=4),
        micro_batch_size=1,
        expert_model_parallel_size=2,
    )
    [problem] = problems(four_ranks, moe)
    assert "TP=2 with EP=2 needs a GPU" in problem.what
    assert problems(four_ranks, replace(moe, hardware=H100)) == []
    odd_width = replace(experts, moe_ffn_hidden_size=65)
    [problem] = problems(sequence_parallel, replace(moe, teacher=odd_width))
    assert "moe_ffn_hidden_size=65" in problem.what


def test_one_error_reports_all_problems() -> None:
    problems = [
        Problem(Rule("r1", ""), "first is wrong", "mend it"),
        Problem(Rule("r2", ""), "second", "drop it"),
    ]
    assert refuse_errors(iter(())) == ()  # returns the warnings: none
    with pytest.raises(RecipeError) as caught:
        refuse_errors(iter(problems))
    assert str(caught.value).splitlines() == [
        "first is wrong",
        "  fix: mend it   [r1]",
        "second",
        "  fix: drop it   [r2]",
    ]


def test_a_chain_has_the_shape_in_its_teachers_config(
    hf_folder: Path, teacher: Architecture
) -> None:
    assert read_chain(str(hf_folder), {}).teacher == teacher
    hf_config = json.loads((hf_folder / "config.json").read_text())
    hf_config["architectures"] = ["MixtralForCausalLM"]
    (hf_folder / "config.json").write_text(json.dumps(hf_config))
    with pytest.raises(RecipeError, match="MixtralForCausalLM is not supported") as caught:
        read_chain(str(hf_folder), {})
    assert str(hf_folder) in str(caught.value)


def test_proposals_fit_and_the_first_is_the_cheapest() -> None:
    student, layout = replace(LLAMA, num_layers=16), Layout(devices=8)
    workload = distillation(student, LLAMA, layout=layout, steps=100)
    layouts = proposals(workload, H100)
    assert layouts
    assert all(fits(p.workload, H100) for p in layouts)
    dollars = [p.cost.dollars for p in layouts]
    assert dollars == sorted(dollars)
    # On 8 GPUs of one node: 8 GB per GPU are too little for any layout, 24 GB suffice.
    assert cheapest_proposal(workload, replace(H100, memory_bytes=8e9), 8, 8) is None
    on_small_gpus = cheapest_proposal(workload, replace(H100, memory_bytes=24e9), 8, 8)
    assert on_small_gpus is not None
    assert on_small_gpus.cost.memory.total < 24e9


@pytest.mark.parametrize(
    ("nodes", "devices", "expected"),
    [(3, 4, {4, 8, 12}), (2, 6, {4, 12}), (1, 4, {4, 8})],
)
def test_proposals_use_whole_nodes(nodes: int, devices: int, expected: set[int]) -> None:
    layout = Layout(nodes=nodes, devices=devices)
    workload = distillation(replace(LLAMA, num_layers=16), LLAMA, layout=layout, steps=100)
    layouts = [p.workload.layout for p in proposals(workload, H100)]
    assert sorted(layout.ranks for layout in layouts if layout.ranks > 2) == sorted(expected)
    if nodes > 1:  # else a node is assumed to have 8 devices
        assert max(layout.devices for layout in layouts) <= devices


def test_a_layout_must_split_the_width_of_the_experts() -> None:
    """An MoE's config also has ``ffn_hidden_size``, which no weight has: TP=8 may not divide it."""
    arch = with_experts(LLAMA, ffn_hidden_size=30, moe_ffn_hidden_size=96)
    layout = Layout(devices=8, tensor=8, sequence_parallel=True)
    workload = distillation(arch, None, layout=layout, global_batch_size=8)
    assert fits(workload, H100)
    indivisible_width = replace(arch, moe_ffn_hidden_size=100)  # by TP=8
    assert not fits(replace(workload, trained=indivisible_width), H100)
    three_expert_ranks = replace(layout, tensor=1, expert=3, devices=3)  # for 8 experts
    assert not fits(replace(workload, layout=three_expert_ranks), H100)


def test_proposals_are_valid_for_a_loss_on_hidden_states() -> None:
    """A loss on hidden states forbids full recomputation, so only selective one is proposed.

    With 22 GB per GPU, all layouts need recomputation. With 80 GB, some layouts do not need it.
    """
    layout, shape = Layout(devices=8), replace(LLAMA, num_layers=16)
    workload = distillation(shape, LLAMA, layout=layout, seq_length=8192, steps=100)
    with_hidden_loss = replace(workload, hidden_state_bytes=8)
    for tried, expected in (
        (workload, {"none", "selective", "full"}),
        (with_hidden_loss, {"none", "selective"}),
    ):
        candidates = workloads_on_all_layouts(tried, 8, 8)
        assert {each.layout.recompute_granularity for each in candidates} == expected
    cheapest = cheapest_proposal(with_hidden_loss, replace(H100, memory_bytes=22e9), 8, 8)
    assert cheapest is not None
    settings = layout_overrides(config(), cheapest.workload)
    assert "stages.distill.recompute_granularity=selective" in settings
    assert "stages.distill.recompute_modules=[mlp]" in settings
    layouts = [p.workload.layout for p in proposals(with_hidden_loss, H100)]
    assert layouts
    # The layers that the loss compares depend on the pipeline size, so it stays as configured: 1.
    granularities_and_pipelines = {(each.recompute_granularity, each.pipeline) for each in layouts}
    assert granularities_and_pipelines == {("none", 1)}


def test_sequence_parallelism_splits_what_context_parallelism_leaves() -> None:
    """At CP=4, a rank has 2002 of 8008 tokens, which 4 tensor-parallel ranks cannot share."""
    layout = Layout(nodes=2, devices=8, tensor=4, context=4, sequence_parallel=True)
    workload = distillation(LLAMA, LLAMA, layout=layout, seq_length=8008, global_batch_size=16)
    [problem] = layout_problems(workload, H100)
    assert "seq_length=8008 is not divisible by TP=4 x CP=4" in problem.what
    assert not list(layout_problems(replace(workload, seq_length=8000), H100))
