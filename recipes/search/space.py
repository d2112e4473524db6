"""Lists the shapes that a teacher can be pruned to within a budget. Does not import torch."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Annotated, Any

from nemo_convert.architecture import Architecture
from recipes.core.constraints import (
    COMPUTED,
    Count,
    Positive,
    PositiveOrZero,
    Rate,
    between,
    one_of,
)
from recipes.engines.settings import BACKENDS, KV_CACHE_BYTES, BuildEngineConfig
from recipes.planning.roofline import Roofline, decode_seconds
from recipes.planning.transformer import (
    WEIGHT_BITS,
    Storage,
    decode_traffic,
    kv_cache_bytes,
    stored_bytes,
)
from recipes.pruning.targets import hidden_divisor

SEARCH_AXES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


@dataclass
class Space:
    """Sizes that the search may use on each axis."""

    num_layers_divisor: Count = 1
    """The number of layers is either the teacher's or a multiple of this."""
    hidden_size_divisor: Count | None = None
    """The hidden size is either the teacher's or a multiple of this. Default: as in ``prune``."""
    ffn_hidden_size_divisor: Count = 64
    """The feed-forward size is either the teacher's or a multiple of this."""
    max_depth_pruning: Annotated[float, between(0, 0.99)] = 0.4
    """Largest fraction of the layers to prune."""
    max_width_pruning: Annotated[float, between(0, 0.99)] = 0.4
    """Largest fraction of each width to prune."""
    prune_heads: bool = False
    """Whether to prune attention heads, the same number from each query group."""
    tensor_model_parallel_size: Count = 1
    """All widths are multiples of this, so that tensor parallelism can split the student. For the
    engines of ``measure_latency``, set ``engine.tensor_parallel_size`` instead."""


@dataclass
class Budget:
    """Limits of a shape's costs."""

    parameters: Positive | None = None
    """Number of parameters, with embeddings. In this and the next three settings, a value of at
    most 1 is a fraction of the teacher's."""
    weight_bytes: Positive | None = None
    """Bytes of the weights in an engine with ``service.precision``."""
    memory_bytes: Positive | None = None
    """Bytes of weights and KV cache."""
    latency_ms: Positive | None = None
    """Milliseconds of a decoding step, by roofline or from ``measure_latency``."""
    tokens_per_second: Positive | None = None
    """Minimum throughput in new tokens per second, summed over ``service.batch_size`` requests of
    ``service.context_length`` tokens. Never a fraction."""

    def limits(self) -> dict[str, float]:
        """Returns the limits that are set."""
        return {name: limit for name, limit in vars(self).items() if limit is not None}


@dataclass
class LatencyFit:
    """Time of a decoding step, fitted to timed engines by ``measure_latency``."""

    step_ms: PositiveOrZero = 0.0
    """Fixed milliseconds of a step, which do not depend on the shape."""
    layer_ms: PositiveOrZero = 0.0
    """Milliseconds per layer."""
    gigabyte_ms: PositiveOrZero = 0.0
    """Milliseconds per 10⁹ bytes that a step reads."""


@dataclass
class Service:
    """How and on which device the student is served; by default in bfloat16 on one H100."""

    device: str = field(default="h100", metadata={"resource": True})  # not in the fingerprint
    """Name of the device, for tables."""
    flops_per_second: Rate = field(default=9.89e14, metadata={"resource": True})
    """Speed of GEMMs in bfloat16."""
    bytes_per_second: Rate = field(default=3.35e12, metadata={"resource": True})
    """Memory bandwidth."""
    backend: Annotated[str, one_of(*BACKENDS)] = "tensorrt_llm"
    """Backend of the engine. This and the next three settings are as in ``build_engine``."""
    precision: Annotated[str, one_of(*WEIGHT_BITS)] = "bf16"
    """Type of the weights."""
    group_size: Count = 64
    """Weights that share a scale, for OpenVINO's ``int4``."""
    kv_cache_dtype: Annotated[str, one_of("auto", *KV_CACHE_BYTES)] = "auto"
    """Type of keys and values."""
    batch_size: Count = 1
    """Number of simultaneous requests."""
    context_length: Count = 4096
    """Mean number of tokens of a request that precede a decoding step."""
    measured: LatencyFit | None = field(default=None, metadata=COMPUTED)
    """Result of ``measure_latency``, if the recipe has that stage; set automatically."""
    speed: str | None = field(default=None, metadata=COMPUTED)
    """The device and its rates, as text for the stage's fingerprint. Set automatically if the
    budget limits speed. Without such a limit, the rates change only a table."""

    def with_speed(self) -> Service:
        """Returns these settings with ``speed`` set."""
        rates = f"{self.flops_per_second:g} FLOP/s, {self.bytes_per_second:g} bytes/s"
        return replace(self, speed=f"{self.device}, {rates}")

    @property
    def storage(self) -> Storage:
        """How the engine stores weights and KV cache."""
        return BuildEngineConfig(
            backend=self.backend,
            precision=self.precision,
            group_size=self.group_size,
            kv_cache_dtype=self.kv_cache_dtype,
        ).storage


def search_sizes(shape: Architecture) -> dict[str, int]:
    """Returns a shape's size on each of ``SEARCH_AXES``."""
    return {axis: getattr(shape, axis) for axis in SEARCH_AXES}


def prune_settings(sizes: Mapping[str, int], layer_importance: str) -> dict[str, Any]:
    """Returns settings of ``prune`` for sizes of ``SEARCH_AXES``.

    ``prune`` requires that the hidden and feed-forward sizes are multiples of its divisors, by
    default 64 or more. So the settings also contain divisors that fit these sizes.
    """
    # Only the names of the hidden and feed-forward sizes contain "hidden".
    divisors = {axis: math.gcd(size, 64) for axis, size in sizes.items() if "hidden" in axis}
    return {
        "layer_importance": layer_importance,
        **{f"target_{axis}": size for axis, size in sizes.items()},
        **{f"{axis}_divisor": divisor for axis, divisor in divisors.items()},
    }


def weight_bytes(shape: Architecture, service: Service) -> int:
    """Returns the bytes of all weights in an engine."""
    return round(stored_bytes(shape, service.storage))


def cache_bytes(shape: Architecture, service: Service) -> int:
    """Returns the bytes of the KV cache of ``batch_size`` requests at ``context_length``."""
    return kv_cache_bytes(shape, service.batch_size * service.context_length, service.storage)


def memory_bytes(shape: Architecture, service: Service) -> int:
    """Returns the bytes of weights and KV cache."""
    return weight_bytes(shape, service) + cache_bytes(shape, service)


def latency_ms(shape: Architecture, service: Service) -> float:
    """Returns the milliseconds of a decoding step, from ``service.measured`` or the roofline."""
    if service.measured is None:
        roofline = Roofline(service.flops_per_second, service.bytes_per_second)
        batch, context = service.batch_size, service.context_length
        return 1e3 * decode_seconds(shape, batch, context, service.storage, roofline)
    fit, gigabytes = service.measured, gigabytes_per_step(shape, service)
    return fit.step_ms + fit.layer_ms * shape.num_layers + fit.gigabyte_ms * gigabytes


def tokens_per_second(shape: Architecture, service: Service) -> float:
    """Returns the new tokens per second of all requests; each request gets one per step."""
    return 1e3 * service.batch_size / latency_ms(shape, service)


def gigabytes_per_step(shape: Architecture, service: Service) -> float:
    """Returns the bytes of weights and KV cache that a decoding step reads, in units of 10⁹."""
    batch, context = service.batch_size, service.context_length
    return decode_traffic(shape, batch, context, service.storage) / 1e9


SHAPE_COSTS: dict[str, Callable[[Architecture, Service], float]] = {
    "parameters": lambda shape, _: shape.parameters(),
    "weight_bytes": weight_bytes,
    "memory_bytes": memory_bytes,
    "latency_ms": latency_ms,
    "tokens_per_second": tokens_per_second,
}
"""Quantities that a budget can limit, and the functions that compute them."""
MINIMUMS = ("tokens_per_second",)
"""Quantities that must be at least their limit; all others must be at most their limit."""


def absolute_limits(
    teacher: Architecture, budget: Mapping[str, float], service: Service
) -> dict[str, float]:
    """Returns a budget's limits, with fractions multiplied by the teacher's cost."""
    limits = {}
    for name, limit in budget.items():
        is_fraction = limit <= 1 and name not in MINIMUMS
        limits[name] = limit * SHAPE_COSTS[name](teacher, service) if is_fraction else limit
    return limits


def enumerate_shapes(
    teacher: Architecture, space: Space, budget: Mapping[str, float], service: Service
) -> list[Architecture]:
    """Returns the shapes within limits of ``SHAPE_COSTS`` that cannot grow, the largest first.

    A shape cannot grow if one more step on any axis would exceed a limit.
    """
    limits = absolute_limits(teacher, budget, service)
    allowed_sizes = {axis: _allowed_sizes(teacher, space, axis) for axis in SEARCH_AXES}

    def fits(shape: Architecture) -> bool:
        costs = {name: SHAPE_COSTS[name](shape, service) for name in limits}
        return all(
            costs[name] >= limit if name in MINIMUMS else costs[name] <= limit
            for name, limit in limits.items()
        )

    def one_step_larger(shape: Architecture) -> Iterator[Architecture]:
        """Yields, for each axis, the shape with the next larger size on it."""
        for axis, sizes in allowed_sizes.items():
            larger_sizes = [size for size in sizes if size > getattr(shape, axis)]
            if larger_sizes:
                yield _resize(shape, {axis: min(larger_sizes)})

    shapes = []
    ffn_sizes = sorted(allowed_sizes["ffn_hidden_size"], reverse=True)
    other_axes = ("num_layers", "hidden_size", "num_attention_heads")
    for other_sizes in product(*(allowed_sizes[axis] for axis in other_axes)):
        base = _resize(teacher, dict(zip(other_axes, other_sizes, strict=True)))
        # Feed-forward sizes are in descending order, and if one fits, all smaller ones fit. So
        # ``fits`` is false for the first sizes and then true. Bisection finds the first true.
        index = bisect(ffn_sizes, False, key=lambda ffn: fits(replace(base, ffn_hidden_size=ffn)))
        if index < len(ffn_sizes):
            shape = replace(base, ffn_hidden_size=ffn_sizes[index])
            if not any(map(fits, one_step_larger(shape))):
                shapes.append(shape)
    return sorted(shapes, key=lambda shape: -shape.parameters())


def corner_shapes(teacher: Architecture, space: Space) -> list[Architecture]:
    """Returns the teacher, and shapes with one axis or all axes at their minimum."""
    smallest = {axis: min(_allowed_sizes(teacher, space, axis)) for axis in SEARCH_AXES}
    one_axis_pruned = (_resize(teacher, {axis: size}) for axis, size in smallest.items())
    return list(dict.fromkeys([teacher, *one_axis_pruned, _resize(teacher, smallest)]))


def middle_shape(teacher: Architecture, space: Space) -> Architecture:
    """Returns the shape with the middle one of the allowed sizes on each axis."""
    allowed_sizes = {axis: _allowed_sizes(teacher, space, axis) for axis in SEARCH_AXES}
    middle_sizes = {axis: sizes[len(sizes) // 2] for axis, sizes in allowed_sizes.items()}
    return _resize(teacher, middle_sizes)


def layer_choices(teacher: Architecture, space: Space) -> list[int]:
    """Returns the numbers of layers that shapes may have."""
    return _allowed_sizes(teacher, space, "num_layers")


def impossible_axes(teacher: Architecture, space: Space) -> list[str]:
    """Returns the axes that have no allowed size, because tensor parallelism can split none."""
    return [axis for axis in SEARCH_AXES if not _allowed_sizes(teacher, space, axis)]


def _resize(shape: Architecture, sizes: Mapping[str, Any]) -> Architecture:
    return replace(shape, **sizes)


def _allowed_sizes(teacher: Architecture, space: Space, axis: str) -> list[int]:
    """Returns the allowed sizes of an axis, up to the teacher's, in ascending order.

    Leaves out sizes that tensor parallelism cannot split, even if it is the teacher's size.
    """
    teacher_size: int = getattr(teacher, axis)
    is_depth = axis == "num_layers"
    max_pruning = space.max_depth_pruning if is_depth else space.max_width_pruning
    rounding_error = 1e-9  # 30 * (1 - 0.7) is slightly more than 9
    smallest = teacher_size * (1 - max_pruning) - rounding_error
    if axis == "num_attention_heads":
        # A step is one head per query group; without pruned heads, there is no smaller size.
        step = teacher.num_query_groups if space.prune_heads else teacher_size
    else:
        divisor = getattr(space, f"{axis}_divisor")
        step = hidden_divisor(teacher, divisor) if axis == "hidden_size" else divisor
    ranks = 1 if is_depth else space.tensor_model_parallel_size
    sizes = {teacher_size, *range(step, teacher_size, step)}
    return sorted(size for size in sizes if size >= smallest and size % ranks == 0)


def name_of(shape: Architecture) -> str:
    """Returns a short name made of the sizes of ``SEARCH_AXES``, such as l30-h576-f1536-a9."""
    sizes = zip("lhfa", search_sizes(shape).values(), strict=True)
    return "-".join(f"{letter}{size}" for letter, size in sizes)
