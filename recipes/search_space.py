"""Shapes that a teacher can be pruned to within a budget. Closed form, without torch.

A shape is listed if no axis can grow by a step without leaving the budget: any other within it is a
part of one that is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from recipes.architecture import Architecture

AXES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


@dataclass
class Space:
    """What may become smaller, in which steps, and how far."""

    num_layers_divisor: int = 1
    hidden_size_divisor: int = 64
    ffn_hidden_size_divisor: int = 64
    max_depth_pruning: float = 0.4
    """Largest share of the layers that may go."""
    max_width_pruning: float = 0.4
    """Largest share of each width that may go."""
    prune_heads: bool = False
    """Whether attention heads may go, as many from each query group."""
    tensor_model_parallel_size: int = 1
    """Sizes are multiples of it, so that the student can be split as planned."""


@dataclass
class Service:
    """How the student is to be served, and on what: bfloat16 on one H100 by default."""

    device: str = "h100"
    flops_per_second: float = 9.89e14
    bytes_per_second: float = 3.35e12
    bytes_per_weight: float = 2
    bytes_per_cached_value: float = 2
    batch_size: int = 1
    context_length: int = 4096


def weight_bytes(shape: Architecture, service: Service) -> float:
    """All weights."""
    return shape.parameters() * service.bytes_per_weight


def cache_bytes(shape: Architecture, service: Service) -> float:
    """Keys and values of full contexts."""
    values = 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels
    tokens = service.batch_size * service.context_length
    return values * tokens * service.bytes_per_cached_value


def memory_bytes(shape: Architecture, service: Service) -> float:
    """Weights and the cache of keys and values."""
    return weight_bytes(shape, service) + cache_bytes(shape, service)


def latency_ms(shape: Architecture, service: Service) -> float:
    """Roofline of one decoding step at full context: what takes longer, to compute or to read."""
    flops = shape.forward_flops_per_token()
    scores = 4 * shape.num_layers * shape.num_attention_heads * shape.kv_channels
    compute = service.batch_size * (flops + scores * service.context_length)
    read = flops / 2 * service.bytes_per_weight + cache_bytes(shape, service)
    return 1e3 * max(compute / service.flops_per_second, read / service.bytes_per_second)


COSTS: dict[str, Callable[[Architecture, Service], float]] = {
    "parameters": lambda shape, _: shape.parameters(),
    "weight_bytes": weight_bytes,
    "memory_bytes": memory_bytes,
    "latency_ms": latency_ms,
}
"""What a budget can limit."""


def limits(
    teacher: Architecture, budget: Mapping[str, float], service: Service
) -> dict[str, float]:
    """A budget in absolute terms: up to 1 it is a share of what the teacher costs."""
    return {
        name: limit * COSTS[name](teacher, service) if limit <= 1 else limit
        for name, limit in budget.items()
    }


def enumerate_shapes(
    teacher: Architecture, space: Space, budget: Mapping[str, float], service: Service
) -> list[Architecture]:
    """All largest shapes within a budget, by parameters, the largest first.

    Args:
        teacher: Shape to prune.
        space: Axes, steps, and how far they go.
        budget: Limits by names of ``COSTS``; a shape keeps all of them.
        service: What costs of serving are counted for.
    """
    allowed = limits(teacher, budget, service)
    choices = {axis: _choices(teacher, space, axis) for axis in AXES}

    def fits(shape: Architecture) -> bool:
        return all(COSTS[name](shape, service) <= limit for name, limit in allowed.items())

    def larger(shape: Architecture) -> Iterator[Architecture]:
        for axis, values in choices.items():
            above = [value for value in values if value > getattr(shape, axis)]
            if above:
                step: dict[str, Any] = {axis: min(above)}
                yield replace(shape, **step)

    found = []
    widest = sorted(choices["ffn_hidden_size"], reverse=True)
    for layers, hidden, heads in product(*(choices[axis] for axis in AXES if "ffn" not in axis)):
        base = replace(teacher, num_layers=layers, hidden_size=hidden, num_attention_heads=heads)
        shapes = (replace(base, ffn_hidden_size=ffn) for ffn in widest)
        shape = next((shape for shape in shapes if fits(shape)), None)
        if shape and not any(fits(other) for other in larger(shape)):
            found.append(shape)
    return sorted(found, key=lambda shape: -shape.parameters())


def _choices(teacher: Architecture, space: Space, axis: str) -> list[int]:
    """Sizes of an axis, the teacher's among them."""
    whole: int = getattr(teacher, axis)
    depth = axis == "num_layers"
    least = whole * (1 - (space.max_depth_pruning if depth else space.max_width_pruning))
    if axis == "num_attention_heads":
        step = teacher.num_query_groups if space.prune_heads else whole
    else:
        step = getattr(space, f"{axis}_divisor")
    ranks = 1 if depth else space.tensor_model_parallel_size
    sizes = {whole, *range(step, whole, step)}
    return sorted(size for size in sizes if size >= least and size % ranks == 0)


def name_of(shape: Architecture) -> str:
    """A short name that tells the sizes."""
    return (
        f"l{shape.num_layers}-h{shape.hidden_size}-f{shape.ffn_hidden_size}"
        f"-a{shape.num_attention_heads}"
    )
