"""Pruning targets: the student's shape for valid targets, and errors for invalid ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import read_architecture
from nemo_convert.smollm2 import HF_CONFIG
from recipes.pruning.targets import (
    PruneTargets,
    absolute_sizes,
    fraction_problems,
    hidden_divisor,
    pruned_shape,
    target_problems,
    transformers_5_problems,
)
from tests.unit.nemo_convert.test_architecture import QWEN3_30B_A3B

DIVISORS = {"hidden_size": 64, "ffn_hidden_size": 64}
"""Numbers that pruned sizes must be multiples of, by axis."""
SMOLLM2 = read_architecture(HF_CONFIG, "smollm2")


def problems(**targets: Any) -> list[tuple[str, str]]:
    """Returns the text and the fix of each problem of pruning SmolLM2 to these targets."""
    found_problems = target_problems(SMOLLM2, PruneTargets(**targets), DIVISORS)
    return [(problem.what, problem.fix) for problem in found_problems]


@pytest.mark.parametrize(
    ("targets", "sizes"),
    [
        ({"hidden_size": 0.89, "ffn_hidden_size": 0.75}, (512, 1152)),
        ({"num_layers": 0.8, "hidden_size": 448}, (24, 448)),
        ({"num_attention_heads": 0.4}, (3,)),
        ({"num_attention_heads": 0.5, "num_query_groups": 0.67}, (4, 2)),
    ],
)
def test_fractions_become_multiples_of_a_divisor_or_of_query_groups(
    targets: dict[str, float], sizes: tuple[int, ...]
) -> None:
    """The teacher has 30 layers, hidden size 576, feed-forward size 1536, and 9 heads in 3 groups.

    So a number of heads must be a multiple of the 3 groups, or of the 2 groups that remain.
    """
    assert absolute_sizes(SMOLLM2, targets, DIVISORS) == dict(zip(targets, sizes, strict=True))


def test_heads_of_a_multi_head_model_are_pruned_by_their_groups() -> None:
    """As in Llama 2 7B, each group has one head."""
    teacher = replace(SMOLLM2, num_query_groups=SMOLLM2.num_attention_heads)
    targets = PruneTargets(num_attention_heads=6)
    [number] = target_problems(teacher, targets, DIVISORS)
    [fraction] = fraction_problems(teacher, {"num_attention_heads": 0.6}, DIVISORS)
    for problem in (number, fraction):
        assert problem.fix.startswith("set target_num_query_groups instead")
    assert not list(target_problems(teacher, PruneTargets(num_query_groups=6), DIVISORS))


def test_pruning_to_the_sizes_of_the_teacher_is_refused() -> None:
    assert problems(num_layers=30, hidden_size=576) == [
        ("all targets are the teacher's sizes", "lower at least one of them")
    ]
    assert not problems(num_layers=30, hidden_size=512)


def test_experts_are_pruned_by_their_own_targets() -> None:
    """The MoE has 128 experts of width 768; a token is routed to 8 of them."""
    moe = read_architecture(QWEN3_30B_A3B, "moe")
    valid = PruneTargets(num_moe_experts=96, moe_ffn_hidden_size=512)
    assert not list(target_problems(moe, valid, DIVISORS))
    assert pruned_shape(moe, valid).num_moe_experts == 96
    [dense_target] = target_problems(moe, PruneTargets(ffn_hidden_size=512), DIVISORS)
    assert (
        "target_ffn_hidden_size=512 is set, but the teacher's feed-forward layers are experts"
        in dense_target.what
    )
    assert "target_ffn_hidden_size=null" in dense_target.fix
    [expert_target] = target_problems(SMOLLM2, PruneTargets(num_moe_experts=4), DIVISORS)
    assert "are dense" in expert_target.what
    # Experts have the divisor setting of dense layers.
    divisors = {**DIVISORS, "moe_ffn_hidden_size": 64}
    [not_a_multiple] = target_problems(moe, PruneTargets(moe_ffn_hidden_size=500), divisors)
    assert not_a_multiple.what.endswith(" ffn_hidden_size_divisor=64")
    [too_few_experts] = target_problems(moe, PruneTargets(num_moe_experts=4), DIVISORS)
    assert "less than the 8 experts that each token is routed to" in too_few_experts.what


@pytest.mark.parametrize(
    "targets",
    [
        {"num_layers": 24},
        {"num_layers": 1},
        {"hidden_size": 512, "ffn_hidden_size": 1152},
        {"hidden_size": 576, "num_layers": 24},
        {"num_attention_heads": 6},
        {"drop_layers": (1, 30)},
        {"drop_layers": (3,), "hidden_size": 512},
    ],
)
def test_valid_targets_have_no_problem(targets: dict[str, Any]) -> None:
    """A target may equal the teacher's size, here 576."""
    assert problems(**targets) == []


@pytest.mark.parametrize(
    # ``what`` and ``fix`` are parts of the problem's texts.
    ("targets", "what", "fix"),
    [
        ({}, "no target is set", "target_* field or drop_layers"),
        ({"num_layers": 31}, "target_num_layers=31 is larger than the teacher's 30", "at most 30"),
        ({"hidden_size": 640}, "target_hidden_size=640 is larger than", "at most 576"),
        ({"num_attention_heads": 12}, "larger than the teacher's 9", "at most 9"),
        ({"ffn_hidden_size": 1100}, "ffn_hidden_size_divisor=64", "use 1088 or 1152,"),
        ({"hidden_size": 570}, "hidden_size_divisor=64", "use 512 or 576,"),
        ({"hidden_size": 20}, "hidden_size_divisor=64", "use 64,"),
        ({"num_layers": 40, "hidden_size": 512}, "larger than the teacher's 30", "at most 30"),
        ({"num_attention_heads": 7}, "the 3 query groups", "a multiple of 3"),
        ({"num_query_groups": 1, "num_attention_heads": 6}, "more than the 3 heads", "at most 3"),
        ({"num_query_groups": 4}, "larger than the teacher's 3", "at most 3"),
        ({"drop_layers": (0, 3)}, "drop_layers has [0]", "numbered 1 to 30"),
        ({"drop_layers": (31,)}, "drop_layers has [31]", "numbered 1 to 30"),
        ({"drop_layers": (2, 2)}, "drop_layers=[2, 2] names a layer twice", "once"),
        ({"drop_layers": tuple(range(1, 31))}, "leaves no layer", "at least one layer"),
        ({"drop_layers": (2,), "num_layers": 24}, "are both set", "one of them"),
    ],
)
def test_problems_state_the_target_and_a_fix(targets: dict[str, Any], what: str, fix: str) -> None:
    [(actual_what, actual_fix)] = problems(**targets)
    assert what in actual_what
    assert fix in actual_fix


@pytest.mark.parametrize(
    ("targets", "changed"),
    [
        ({"drop_layers": (1, 3)}, {"num_layers": 2}),
        ({"num_layers": 3}, {"num_layers": 3}),
        ({"hidden_size": 64}, {"hidden_size": 64}),
        ({"num_attention_heads": 4}, {"num_attention_heads": 4}),
        ({"num_query_groups": 2}, {"num_query_groups": 2, "num_attention_heads": 4}),
    ],
)
def test_axes_without_a_target_are_not_pruned(
    teacher: Architecture, targets: dict[str, Any], changed: dict[str, int]
) -> None:
    """The teacher has 4 layers, and 8 heads in 4 groups. Each remaining group keeps its 2 heads."""
    student = pruned_shape(teacher, PruneTargets(**targets))
    assert student == replace(teacher, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "heads", "hidden", "divisor"),
    [
        ("LlamaForCausalLM", 32, 4096, 64),
        ("LlamaForCausalLM", 40, 5120, 320),
        # The least common multiple of 64 and 9 heads is 576, the only possible size. So 64 is used.
        ("LlamaForCausalLM", 9, 576, 64),
        ("Qwen3ForCausalLM", 40, 5120, 64),
    ],
)
def test_hidden_sizes_of_large_llamas_are_multiples_of_the_number_of_heads(
    family: str, heads: int, hidden: int, divisor: int
) -> None:
    teacher = replace(
        SMOLLM2, hf_architecture=family, num_attention_heads=heads, hidden_size=hidden
    )
    assert hidden_divisor(teacher, None) == divisor  # the default
    assert hidden_divisor(teacher, 8) == 8  # a configured divisor
    if divisor % heads == 0:  # then transformers 5 loads all pruned sizes
        pruned = replace(teacher, hidden_size=hidden - divisor)
        assert list(transformers_5_problems("prune", pruned)) == []
