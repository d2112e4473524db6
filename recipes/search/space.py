"""Shapes that a teacher can be pruned to within a budget. Closed form, without torch.

A shape is listed if no axis can grow by a step without leaving the budget: any other within it is a
part of one that is listed.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any

from nemo_convert.architecture import Architecture
from recipes.core.constraints import Count, Positive, PositiveOrZero, Rate, between, one_of
from recipes.planning.inference_cost import Roofline, decode_seconds
from recipes.planning.transformer import (
    WEIGHT_BITS,
    Storage,
    decode_traffic,
    kv_cache_bytes,
    stored_bytes,
)

SEARCH_AXES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


@dataclass
class Space:
    """What may become smaller, in which steps, and how far."""

    num_layers_divisor: Count = 1
    """Steps in which layers go."""
    hidden_size_divisor: Count = 64
    """Steps in which the width goes."""
    ffn_hidden_size_divisor: Count = 64
    """Steps in which the feed-forward width goes."""
    max_depth_pruning: Annotated[float, between(0, 0.99)] = 0.4
    """Largest share of the layers that may go."""
    max_width_pruning: Annotated[float, between(0, 0.99)] = 0.4
    """Largest share of each width that may go."""
    prune_heads: bool = False
    """Whether attention heads may go, as many from each query group."""
    tensor_model_parallel_size: Count = 1
    """Sizes are multiples of it, so that the student can be split as planned."""


@dataclass
class Budget:
    """Limits that a shape keeps; of what it costs, up to 1 a share of the teacher's."""

    parameters: Positive | None = None
    """All of them, embeddings included."""
    weight_bytes: Positive | None = None
    """As an engine stores them; see ``service``."""
    memory_bytes: Positive | None = None
    """Weights and the cache of keys and values."""
    latency_ms: Positive | None = None
    """Of one decoding step, by roofline or as ``measure_latency`` found."""
    tokens_per_second: Positive | None = None
    """At least so many new ones of all ``service.batch_size`` requests together, at
    ``service.context_length``; from the same step, and never a share."""

    def limits(self) -> dict[str, float]:
        """Those that are set."""
        return {name: limit for name, limit in vars(self).items() if limit is not None}


@dataclass
class LatencyFit:
    """What a decoding step takes, as ``measure_latency`` fits it to timed engines."""

    step_ms: PositiveOrZero = 0.0
    """Whatever the shape."""
    layer_ms: PositiveOrZero = 0.0
    """More for each layer."""
    gigabyte_ms: PositiveOrZero = 0.0
    """More for each 10⁹ bytes read."""


@dataclass
class Service:
    """How the student is to be served, and on what: bfloat16 on one H100 by default."""

    device: str = "h100"
    """Its name, for tables."""
    flops_per_second: Rate = 9.89e14
    """Of products in bfloat16."""
    bytes_per_second: Rate = 3.35e12
    """Bandwidth of its memory."""
    precision: Annotated[str, one_of(*WEIGHT_BITS)] = "bf16"
    """Of weights, as in ``build_engine``."""
    group_size: Count = 64
    """Weights that share a scale, for ``int4``."""
    bytes_per_cached_value: Count = 2
    """Of keys and values."""
    batch_size: Count = 1
    """Requests at once."""
    context_length: Count = 4096
    """Tokens that a step sees, on average."""
    measured: LatencyFit | None = None
    """Put in from ``measure_latency`` where there is one."""

    @property
    def storage(self) -> Storage:
        """How weights and cache are kept."""
        group = self.group_size if self.precision == "int4" else None
        return Storage(self.precision, group, self.bytes_per_cached_value)


def axes_of(shape: Architecture) -> dict[str, int]:
    """Sizes of ``SEARCH_AXES``."""
    return {axis: getattr(shape, axis) for axis in SEARCH_AXES}


def prune_settings(sizes: Mapping[str, int], layer_importance: str) -> dict[str, Any]:
    """Settings of ``prune`` for sizes of ``SEARCH_AXES``, with divisors that fit them."""
    divisors = {axis: math.gcd(size, 64) for axis, size in sizes.items() if "hidden" in axis}
    return {
        "layer_importance": layer_importance,
        **{f"target_{axis}": size for axis, size in sizes.items()},
        **{f"{axis}_divisor": divisor for axis, divisor in divisors.items()},
    }


def weight_bytes(shape: Architecture, service: Service) -> int:
    """All weights, as an engine stores them."""
    return round(stored_bytes(shape, service.storage))


def cache_bytes(shape: Architecture, service: Service) -> int:
    """Keys and values of full contexts."""
    tokens = service.batch_size * service.context_length
    return kv_cache_bytes(shape, tokens, service.storage)


def memory_bytes(shape: Architecture, service: Service) -> int:
    """Weights and the cache of keys and values."""
    return weight_bytes(shape, service) + cache_bytes(shape, service)


def latency_ms(shape: Architecture, service: Service) -> float:
    """One decoding step at full context: as engines were measured, else by roofline."""
    if service.measured is None:
        roofline = Roofline(service.flops_per_second, service.bytes_per_second)
        batch, context = service.batch_size, service.context_length
        return 1e3 * decode_seconds(shape, batch, context, service.storage, roofline)
    line, read = service.measured, read_gigabytes(shape, service)
    return line.step_ms + line.layer_ms * shape.num_layers + line.gigabyte_ms * read


def tokens_per_second(shape: Architecture, service: Service) -> float:
    """New tokens of all requests at full context, each of which gets one a step."""
    return 1e3 * service.batch_size / latency_ms(shape, service)


def read_gigabytes(shape: Architecture, service: Service) -> float:
    """10⁹ bytes that a decoding step reads at full context: weights and cache."""
    batch, context = service.batch_size, service.context_length
    return decode_traffic(shape, batch, context, service.storage) / 1e9


SHAPE_COSTS: dict[str, Callable[[Architecture, Service], float]] = {
    "parameters": lambda shape, _: shape.parameters(),
    "weight_bytes": weight_bytes,
    "memory_bytes": memory_bytes,
    "latency_ms": latency_ms,
    "tokens_per_second": tokens_per_second,
}
"""What a budget can limit."""
AT_LEAST = ("tokens_per_second",)
"""Of them, what is not to be less; all others are not to be more."""


def limits(
    teacher: Architecture, budget: Mapping[str, float], service: Service
) -> dict[str, float]:
    """A budget in absolute terms: up to 1, costs are shares of the teacher's."""
    return {
        name: limit * SHAPE_COSTS[name](teacher, service)
        if limit <= 1 and name not in AT_LEAST
        else limit
        for name, limit in budget.items()
    }


def enumerate_shapes(
    teacher: Architecture, space: Space, budget: Mapping[str, float], service: Service
) -> list[Architecture]:
    """All largest shapes within a budget by names of ``SHAPE_COSTS``, the largest first."""
    allowed = limits(teacher, budget, service)
    choices = {axis: _choices(teacher, space, axis) for axis in SEARCH_AXES}

    def fits(shape: Architecture) -> bool:
        costs = {name: SHAPE_COSTS[name](shape, service) for name in allowed}
        return all(
            costs[name] >= limit if name in AT_LEAST else costs[name] <= limit
            for name, limit in allowed.items()
        )

    def larger(shape: Architecture) -> Iterator[Architecture]:
        for axis, values in choices.items():
            above = [value for value in values if value > getattr(shape, axis)]
            if above:
                step: dict[str, Any] = {axis: min(above)}
                yield replace(shape, **step)

    found = []
    widest = sorted(choices["ffn_hidden_size"], reverse=True)
    for layers, hidden, heads in product(
        *(choices[axis] for axis in SEARCH_AXES if "ffn" not in axis)
    ):
        base = replace(teacher, num_layers=layers, hidden_size=hidden, num_attention_heads=heads)
        # Whatever the budget limits, a wider shape costs more of it.
        place = bisect(widest, False, key=lambda ffn: fits(replace(base, ffn_hidden_size=ffn)))
        if place < len(widest):
            shape = replace(base, ffn_hidden_size=widest[place])
            if not any(fits(other) for other in larger(shape)):
                found.append(shape)
    return sorted(found, key=lambda shape: -shape.parameters())


def corners(teacher: Architecture, space: Space) -> list[Architecture]:
    """The teacher, it with each axis as small as may be, and with all of them so."""
    least: dict[str, Any] = {axis: min(_choices(teacher, space, axis)) for axis in SEARCH_AXES}
    each = (replace(teacher, **{axis: size}) for axis, size in least.items())
    return list(dict.fromkeys([teacher, *each, replace(teacher, **least)]))


def middle(teacher: Architecture, space: Space) -> Architecture:
    """A shape between the corners."""
    choices = {axis: _choices(teacher, space, axis) for axis in SEARCH_AXES}
    sizes: dict[str, Any] = {axis: found[len(found) // 2] for axis, found in choices.items()}
    return replace(teacher, **sizes)


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
