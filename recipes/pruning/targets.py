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
"""Prunable axes of dense feed-forward layers."""
EXPERT_AXES = ("num_moe_experts", "moe_ffn_hidden_size")
"""Prunable axes of MoE feed-forward layers."""
MAX_FRACTION = 1 / 3
"""Largest fraction of the parameters to remove before one distillation (ModelOpt's advice)."""
ONLY_GROUPS = "set target_num_query_groups instead: each group then keeps its heads"
"""Fix of a wrong number of heads if each query group of the teacher has only one head."""


@dataclass(frozen=True)
class PruneTargets:
    """Target sizes by Megatron's names of the axes; ``None`` means that an axis is not pruned."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    drop_layers: tuple[int, ...] = ()
    """Numbers of the layers to remove, counted from 1."""

    def width(self) -> dict[str, int]:
        """Maps each axis with a target, except layers, to the target size."""
        axes = ("hidden_size", "num_attention_heads", "num_query_groups", *DENSE_AXES, *EXPERT_AXES)
        return {axis: value for axis in axes if (value := getattr(self, axis)) is not None}


def hidden_divisor(teacher: Architecture, configured: int | None) -> int:
    """Returns the number that a pruned hidden size must be a multiple of.

    ``configured`` is the setting ``hidden_size_divisor``. If it is ``None``, the number is 64, for
    fast kernels and for quantization in groups of 64. For Llama it is the least common multiple of
    64 and the number of heads, because transformers 5 refuses other hidden sizes. Small Llama
    models keep 64, because multiples of the larger number give fewer than eight possible sizes.
    """
    if configured is not None:
        return configured
    if not _needs_whole_heads(teacher):
        return 64
    divisor = math.lcm(64, teacher.num_attention_heads)
    return divisor if 8 * divisor <= teacher.hidden_size else 64


def _needs_whole_heads(shape: Architecture) -> bool:
    """Returns whether transformers 5 requires ``hidden_size`` to be a multiple of the heads."""
    return shape.hf_architecture == "LlamaForCausalLM"


def is_refused_by_transformers_5(shape: Architecture) -> bool:
    """Returns whether transformers 5 does not load a model of this shape."""
    return _needs_whole_heads(shape) and shape.hidden_size % shape.num_attention_heads != 0


def transformers_5_problems(stage: str, student: Architecture) -> Iterator[Problem]:
    """Warns if transformers 5 refuses the student."""
    if is_refused_by_transformers_5(student):
        hidden, heads = student.hidden_size, student.num_attention_heads
        largest_valid = hidden // heads * heads  # not larger than ``hidden``
        yield Problem(
            rules.TRANSFORMERS_5,
            f"{stage} makes a Llama model with hidden size {hidden} and {heads} heads, which "
            "transformers 5 and the programs that use it do not load; transformers 4 loads it",
            f"if you need transformers 5: stages.{stage}.target_hidden_size={largest_valid} "
            f"stages.{stage}.hidden_size_divisor={math.gcd(largest_valid, 64)}",
        )


def searched_shape_problems(stage: str, shapes: Sequence[Architecture]) -> Iterator[Problem]:
    """Warns if transformers 5 refuses some of a search's shapes."""
    refused = [shape for shape in shapes if is_refused_by_transformers_5(shape)]
    if refused:
        heads = {shape.num_attention_heads for shape in shapes}
        fix = "search with "
        if len(heads) > 1:
            # The teacher's hidden size is always searched. Not all numbers of heads divide it.
            fix += "stages.enumerate_shapes.space.prune_heads=false "
        # With this fix, all shapes have the teacher's heads: ``max(heads)``. With 8 instead of the
        # default 64, a small model has more possible sizes.
        divisor = math.lcm(8, max(heads))
        yield Problem(
            rules.TRANSFORMERS_5,
            f"{len(refused)} of {len(shapes)} shapes of {stage} are Llama models whose hidden size "
            "is not a multiple of their attention heads: transformers 5 does not load them",
            f"if you need transformers 5, {fix}"
            f"stages.enumerate_shapes.space.hidden_size_divisor={divisor}",
        )


def absolute_sizes(
    teacher: Architecture, targets: Mapping[str, int | float], divisors: Mapping[str, int]
) -> dict[str, int]:
    """Returns the target size by axis. ``targets`` and ``divisors`` also have axes as keys.

    In ``targets``, an integer is a size, and a float is a fraction of the teacher's size. The
    product of a fraction and the teacher's size is rounded to a multiple of the axis's divisor (by
    default 1), or for attention heads to a multiple of the number of query groups.
    """
    sizes: dict[str, int] = {}
    # ``num_attention_heads`` is sorted last, because it depends on ``num_query_groups``.
    for axis, target in sorted(targets.items(), key=lambda item: item[0] == "num_attention_heads"):
        if axis == "num_attention_heads":
            divisor = sizes.get("num_query_groups") or teacher.num_query_groups
        else:
            divisor = divisors.get(axis, 1)
        if isinstance(target, float):
            sizes[axis] = round(target * getattr(teacher, axis) / divisor) * divisor
        else:
            sizes[axis] = target
    return sizes


def pruned_shape(teacher: Architecture, targets: PruneTargets) -> Architecture:
    """Returns the student's shape. Axes without a target have the teacher's size.

    If only query groups have a target, each remaining group keeps all of its attention heads.
    """
    layers = targets.num_layers
    if targets.drop_layers:
        layers = teacher.num_layers - len(targets.drop_layers)
    width: dict[str, Any] = targets.width()
    if targets.num_query_groups and not targets.num_attention_heads:
        heads_per_group = teacher.num_attention_heads // teacher.num_query_groups
        width["num_attention_heads"] = heads_per_group * targets.num_query_groups
    return replace(teacher, num_layers=layers or teacher.num_layers, **width)


def _problem(what: str, fix: str) -> Problem:
    return Problem(rules.PRUNE_TARGET, what, fix)


def target_problems(
    teacher: Architecture, targets: PruneTargets, divisors: Mapping[str, int]
) -> Iterator[Problem]:
    """Yields a problem for each target that the teacher cannot be pruned to."""
    if not targets.width() and targets.num_layers is None and not targets.drop_layers:
        yield _problem("no target is set", "set at least one target_* field or drop_layers")
    elif not targets.drop_layers and pruned_shape(teacher, targets) == teacher:
        yield _problem("all targets are the teacher's sizes", "lower at least one of them")
    existing_axes: tuple[str, ...]
    absent_axes: tuple[str, ...]
    if teacher.num_moe_experts:
        layer_type, existing_axes, absent_axes = "experts", EXPERT_AXES, DENSE_AXES
    else:
        layer_type, existing_axes, absent_axes = "dense", DENSE_AXES, EXPERT_AXES
    for axis, target in {**targets.width(), "num_layers": targets.num_layers}.items():
        if axis in absent_axes:
            yield _problem(
                f"target_{axis}={target} is set, but the teacher's feed-forward layers are "
                f"{layer_type}",
                f"set target_{axis}=null and, to prune these layers, "
                f"{' or '.join(f'target_{existing}' for existing in existing_axes)}",
            )
        elif target is not None:
            yield from _axis_problems(axis, target, getattr(teacher, axis), divisors.get(axis, 1))
    yield from _head_problems(teacher, targets)
    experts = targets.num_moe_experts
    if experts is not None and 0 < experts < teacher.moe_router_topk:
        yield _problem(
            f"target_num_moe_experts={experts} is less than the "
            f"{teacher.moe_router_topk} experts that each token is routed to",
            f"use at least {teacher.moe_router_topk}",
        )
    yield from _drop_layer_problems(teacher, targets)


def fraction_problems(
    teacher: Architecture, targets: Mapping[str, int | float], divisors: Mapping[str, int]
) -> Iterator[Problem]:
    """Yields a problem for each fraction that rounds to 0 or to the teacher's size.

    Ignores axes that the teacher does not have. ``target_problems`` reports them.
    """
    sizes = absolute_sizes(teacher, targets, divisors)
    for axis, target in targets.items():
        full, size = getattr(teacher, axis), sizes[axis]
        if isinstance(target, float) and full and not 0 < size < full:
            smaller_divisor = f"a smaller {_divisor_setting(axis)}, or " if axis in divisors else ""
            fix = f"use another fraction, a number below {full}, or {smaller_divisor}null"
            if axis == "num_attention_heads" and full == teacher.num_query_groups:
                fix = ONLY_GROUPS
            yield _problem(
                f"target_{axis}={target:g} of the teacher's {full} rounds to {size}, which must "
                f"be greater than 0 and less than {full}",
                fix,
            )


def _axis_problems(axis: str, target: int, full: int, divisor: int) -> Iterator[Problem]:
    """Checks that a target is at most the teacher's size ``full``, and a multiple of the divisor.

    The teacher's size itself is valid even if it is not a multiple.
    """
    name = f"target_{axis}={target}"
    if target > full:
        yield _problem(f"{name} is larger than the teacher's {full}", f"use at most {full}")
    elif target != full and target % divisor:
        lower = target // divisor * divisor
        valid_sizes = [size for size in (lower, lower + divisor) if 0 < size <= full]
        choices = " or ".join(map(str, valid_sizes))
        change_divisor = f"set the divisor to a number that divides {target}"
        yield _problem(
            f"{name} is not a multiple of {_divisor_setting(axis)}={divisor}",
            f"use {choices}, or {change_divisor}" if choices else change_divisor,
        )


def _divisor_setting(axis: str) -> str:
    """Returns the name of an axis's divisor. Experts use ``ffn_hidden_size_divisor``, too."""
    return f"{axis.removeprefix('moe_')}_divisor"


def _head_problems(teacher: Architecture, targets: PruneTargets) -> Iterator[Problem]:
    """Checks that all groups keep equally many heads, and at most as many as in the teacher."""
    heads = targets.num_attention_heads
    if heads is None or heads > teacher.num_attention_heads:  # ``_axis_problems`` reports too many
        return
    groups = targets.num_query_groups or teacher.num_query_groups
    limit = teacher.num_attention_heads // teacher.num_query_groups * groups
    name = f"target_num_attention_heads={heads}"
    if heads % groups:
        # With one head in each group, heads can only be removed together with their groups.
        fix = f"use a multiple of {groups}" if groups < teacher.num_attention_heads else ONLY_GROUPS
        yield _problem(f"{name} is not a multiple of the {groups} query groups", fix)
    elif heads > limit:
        yield _problem(
            f"{name} is more than the {limit} heads that the teacher has in {groups} query groups",
            f"use at most {limit}",
        )


def _drop_layer_problems(teacher: Architecture, targets: PruneTargets) -> Iterator[Problem]:
    drop_layers, num_layers = targets.drop_layers, teacher.num_layers
    if drop_layers and targets.num_layers is not None:
        yield _problem("drop_layers and target_num_layers are both set", "set one of them")
    if invalid := [layer for layer in drop_layers if not 1 <= layer <= num_layers]:
        yield _problem(
            f"drop_layers has {invalid}, which the teacher does not have",
            f"use layers of the teacher, which are numbered 1 to {num_layers}",
        )
    if len(set(drop_layers)) != len(drop_layers):
        what = f"drop_layers={list(drop_layers)} names a layer twice"
        yield _problem(what, "name each layer once")
    if len(set(drop_layers)) >= num_layers:
        yield _problem("drop_layers leaves no layer", "keep at least one layer")
