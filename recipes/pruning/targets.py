"""Target sizes of pruning, and checks of them. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_convert.architecture import Architecture
from recipes.planning import rules
from recipes.planning.rules import Problem

DENSE_AXES = ("ffn_hidden_size",)
EXPERT_AXES = ("num_moe_experts", "moe_ffn_hidden_size")
"""Axes of feed-forward layers that can be pruned."""
MAX_FRACTION = 1 / 3
"""Largest fraction of the parameters to prune before a distillation, according to NVIDIA."""


@dataclass(frozen=True)
class PruneTargets:
    """Target sizes; ``None`` does not prune the axis. Layers are counted from 1."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    drop_layers: tuple[int, ...] = ()

    def width(self) -> dict[str, int]:
        """Returns the width targets that are set, by Megatron's names."""
        heads = ("num_attention_heads", "num_query_groups")
        axes = ("hidden_size", *heads, *DENSE_AXES, *EXPERT_AXES)
        return {axis: value for axis in axes if (value := getattr(self, axis)) is not None}


def hidden_divisor(teacher: Architecture, configured: int | None) -> int:
    """Returns the divisor of a pruned hidden size.

    By default this is 64, for fast kernels and for quantisation in groups of 64. transformers 5
    refuses a Llama model whose hidden size is not a multiple of its heads, so for Llama the default
    is a multiple of the heads, too, unless that leaves fewer than eight sizes.
    """
    if configured is not None:
        return configured
    divisor = math.lcm(64, teacher.num_attention_heads) if _needs_whole_heads(teacher) else 64
    return divisor if 8 * divisor <= teacher.hidden_size else 64


def _needs_whole_heads(shape: Architecture) -> bool:
    """Whether transformers 5 requires that the hidden size is a multiple of the heads."""
    return shape.hf_architecture == "LlamaForCausalLM"


def is_refused_by_transformers_5(shape: Architecture) -> bool:
    """Whether transformers 5 does not load a model of this shape."""
    return _needs_whole_heads(shape) and shape.hidden_size % shape.num_attention_heads != 0


def transformers_5_problems(stage: str, student: Architecture) -> Iterator[Problem]:
    """Warns if transformers 5 refuses the student."""
    hidden, heads = student.hidden_size, student.num_attention_heads
    if is_refused_by_transformers_5(student):
        lower = hidden // heads * heads
        yield Problem(
            rules.TRANSFORMERS_5,
            f"{stage} makes a Llama model with hidden size {hidden} and {heads} heads, which "
            "transformers 5 and the programs that use it do not load; transformers 4 loads it",
            f"if you need transformers 5: stages.{stage}.target_hidden_size={lower} "
            f"stages.{stage}.hidden_size_divisor={math.gcd(lower, 64)}",
        )


def searched_shape_problems(stage: str, shapes: Sequence[Architecture]) -> Iterator[Problem]:
    """Warns if transformers 5 refuses shapes of a search."""
    refused = [shape for shape in shapes if is_refused_by_transformers_5(shape)]
    if refused:
        divisor = math.lcm(8, refused[0].num_attention_heads)
        yield Problem(
            rules.TRANSFORMERS_5,
            f"{len(refused)} of {len(shapes)} shapes of {stage} are Llama models whose hidden size "
            "is not a multiple of their attention heads: transformers 5 does not load them",
            "if you need transformers 5, search with "
            f"stages.enumerate_shapes.space.hidden_size_divisor={divisor}",
        )


def absolute_sizes(
    teacher: Architecture, targets: Mapping[str, int | float], divisors: Mapping[str, int]
) -> dict[str, int]:
    """Returns targets as sizes: fractions are multiplied by the teacher's size and rounded.

    They are rounded to a multiple of the axis's divisor or, for heads, of the number of groups.
    """
    sizes: dict[str, int] = {}
    # Groups come first, because heads depend on them.
    for axis, size in sorted(targets.items(), key=lambda item: item[0] == "num_attention_heads"):
        step = divisors.get(axis, 1)
        if axis == "num_attention_heads":
            step = sizes.get("num_query_groups") or teacher.num_query_groups
        if isinstance(size, float):
            size = round(size * getattr(teacher, axis) / step) * step
        sizes[axis] = int(size)
    return sizes


def pruned_shape(teacher: Architecture, targets: PruneTargets) -> Architecture:
    """Returns the student's shape, with the teacher's ``kv_channels``.

    A query group that is kept keeps all of its heads, unless the number of heads has a target.
    """
    layers = targets.num_layers
    if targets.drop_layers:
        layers = teacher.num_layers - len(targets.drop_layers)
    width: dict[str, Any] = targets.width()
    if targets.num_query_groups and not targets.num_attention_heads:
        per_group = teacher.num_attention_heads // teacher.num_query_groups
        width["num_attention_heads"] = per_group * targets.num_query_groups
    return replace(teacher, num_layers=layers or teacher.num_layers, **width)


def _problem(what: str, fix: str) -> Problem:
    return Problem(rules.PRUNE_TARGET, what, fix)


def target_problems(
    teacher: Architecture, targets: PruneTargets, divisors: Mapping[str, int]
) -> Iterator[Problem]:
    """Yields a problem for each target that the teacher cannot be pruned to."""
    if not targets.width() and targets.num_layers is None and not targets.drop_layers:
        yield _problem("no target is set", "set at least one target_* field or drop_layers")
    wrong = DENSE_AXES if teacher.num_moe_experts else EXPERT_AXES
    for axis, target in {**targets.width(), "num_layers": targets.num_layers}.items():
        if axis in wrong:
            ffn, axes = ("experts", EXPERT_AXES) if axis in DENSE_AXES else ("dense", DENSE_AXES)
            yield _problem(
                f"target_{axis}={target} is set, but the teacher's feed-forward layers are {ffn}",
                f"set target_{axis}=null and, to prune these layers, "
                f"{' or '.join(f'target_{a}' for a in axes)}",
            )
        elif target is not None:
            yield from _axis_problems(axis, target, getattr(teacher, axis), divisors.get(axis, 1))
    yield from _head_problems(teacher, targets)
    if 0 < (targets.num_moe_experts or 0) < teacher.moe_router_topk:
        yield _problem(
            f"target_num_moe_experts={targets.num_moe_experts} is less than the "
            f"{teacher.moe_router_topk} experts that each token is routed to",
            f"use at least {teacher.moe_router_topk}",
        )
    yield from _drop_layer_problems(teacher, targets)


def fraction_problems(
    teacher: Architecture, targets: Mapping[str, int | float], divisors: Mapping[str, int]
) -> Iterator[Problem]:
    """Yields a problem for each fraction that rounds to all of an axis, or to nothing."""
    sizes = absolute_sizes(teacher, targets, divisors)
    for axis, fraction in targets.items():
        full, size = getattr(teacher, axis), sizes[axis]
        if isinstance(fraction, float) and full and not 0 < size < full:
            yield _problem(
                f"target_{axis}={fraction:g} of the teacher's {full} rounds to {size}, which must "
                f"be greater than 0 and less than {full}",
                f"use another fraction, a number below {full}, or "
                + ("null" if axis not in divisors else f"a smaller {axis}_divisor, or null"),
            )


def _axis_problems(axis: str, target: int, full: int, divisor: int) -> Iterator[Problem]:
    """Checks a target against the teacher's ``full`` size and the divisor."""
    name = f"target_{axis}={target}"
    if target > full:
        yield _problem(f"{name} is larger than the teacher's {full}", f"use at most {full}")
    elif target != full and target % divisor:
        lower = target // divisor * divisor
        choices = " or ".join(str(c) for c in (lower, lower + divisor) if 0 < c <= full)
        yield _problem(
            f"{name} is not a multiple of {axis}_divisor={divisor}",
            f"use {choices}, or a divisor of {target}" if choices else f"set a divisor of {target}",
        )


def _head_problems(teacher: Architecture, targets: PruneTargets) -> Iterator[Problem]:
    """Checks that all groups keep the same number of heads, at most the teacher's."""
    groups = targets.num_query_groups or teacher.num_query_groups
    heads = targets.num_attention_heads
    limit = teacher.num_attention_heads // teacher.num_query_groups * groups
    if heads is None or heads > teacher.num_attention_heads:  # for the latter, see _axis_problems
        return
    name = f"target_num_attention_heads={heads}"
    if heads % groups:
        yield _problem(
            f"{name} is not a multiple of the {groups} query groups", f"use a multiple of {groups}"
        )
    elif heads > limit:
        yield _problem(
            f"{name} is more than the {limit} heads that the teacher has in {groups} query groups",
            f"use at most {limit}",
        )


def _drop_layer_problems(teacher: Architecture, targets: PruneTargets) -> Iterator[Problem]:
    drop, layers = targets.drop_layers, teacher.num_layers
    if drop and targets.num_layers is not None:
        yield _problem("drop_layers and target_num_layers are both set", "set one of them")
    if wrong := [layer for layer in drop if not 1 <= layer <= layers]:
        yield _problem(f"drop_layers has {wrong}", f"layers are numbered 1 to {layers}")
    if len(set(drop)) != len(drop):
        yield _problem(f"drop_layers={list(drop)} names a layer twice", "name each layer once")
    if len(set(drop)) >= layers:
        yield _problem("drop_layers leaves no layer", "keep at least one layer")
