"""Tests the shapes that a search lists, their costs, and the fit of a latency model.

Sizes in ``Architecture`` are in this order: layers, hidden size, feed-forward size, heads, query
groups, channels per head, vocabulary, positions.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.search.latency import fit_latency
from recipes.search.space import (
    LatencyFit,
    Service,
    Space,
    cache_bytes,
    corner_shapes,
    enumerate_shapes,
    gigabytes_per_step,
    latency_ms,
    memory_bytes,
    middle_shape,
    name_of,
    weight_bytes,
)

QWEN3_8B = Architecture(
    "LlamaForCausalLM", 36, 4096, 12288, 32, 8, 128, 151936, 40960, tied_embeddings=False
)
"""A Llama of the size of Qwen3 8B, which has no norms of queries and keys. Those are 9,216 of 8
billion parameters."""
LLAMA_70B = Architecture(
    "LlamaForCausalLM", 80, 8192, 28672, 64, 8, 128, 128256, 131072, tied_embeddings=False
)
SMOLLM2 = Architecture(
    "LlamaForCausalLM", 30, 576, 1536, 9, 3, 64, 49152, 8192, tied_embeddings=True
)
COARSE = Space(hidden_size_divisor=256, ffn_hidden_size_divisor=512)
"""A space with few sizes, so that the search is fast."""


def test_the_published_shape_of_qwen3_is_listed() -> None:
    """The example search of NVIDIA/Model-Optimizer for 6 billion parameters found this shape.

    It has 30 layers, hidden size 3584 and feed-forward size 11776.
    """
    shapes = enumerate_shapes(QWEN3_8B, COARSE, {"parameters": 6e9}, Service())
    [published] = [shape for shape in shapes if name_of(shape) == "l30-h3584-f11776-a32"]
    assert round(published.parameters() / 1e9, 2) == 5.99


@pytest.mark.parametrize(
    "budget",
    [
        {"parameters": 0.75},
        {"parameters": 1e8, "memory_bytes": 2.05e8},
        {"latency_ms": 0.7},
        {"weight_bytes": 0.8},
    ],
)
def test_exactly_the_shapes_that_cannot_grow_are_listed(budget: dict[str, float]) -> None:
    """Compares with every combination of the allowed sizes.

    All are at least 0.6 of the teacher's, because ``Space`` prunes at most 0.4 by default.
    """
    space = Space(hidden_size_divisor=96, ffn_hidden_size_divisor=256, prune_heads=True)
    service = Service(context_length=512)  # in bfloat16, two bytes per parameter
    costs: dict[str, Any] = {
        "parameters": lambda s: s.parameters(),
        "weight_bytes": lambda s: 2 * s.parameters(),
        "memory_bytes": lambda s: memory_bytes(s, service),
        "latency_ms": lambda s: latency_ms(s, service),
    }
    axes: dict[str, Any] = {
        "num_layers": range(18, 31),
        "hidden_size": (384, 480, 576),
        "ffn_hidden_size": (1024, 1280, 1536),
        "num_attention_heads": (6, 9),
    }

    # A limit of at most 1 is a fraction of the teacher's cost.
    limits = {
        name: limit * costs[name](SMOLLM2) if limit <= 1 else limit
        for name, limit in budget.items()
    }

    def fits(sizes: tuple[int, ...]) -> bool:
        shape = dataclasses.replace(SMOLLM2, **dict(zip(axes, sizes, strict=True)))
        return all(costs[name](shape) <= limit for name, limit in limits.items())

    def is_larger(sizes: tuple[int, ...], other: tuple[int, ...]) -> bool:
        """Whether no size is smaller than in ``other``, and at least one is larger."""
        return sizes != other and all(a >= b for a, b in zip(sizes, other, strict=True))

    fitting = [sizes for sizes in itertools.product(*axes.values()) if fits(sizes)]
    maximal = {sizes for sizes in fitting if not any(is_larger(other, sizes) for other in fitting)}
    shapes = enumerate_shapes(SMOLLM2, space, budget, service)
    assert maximal
    assert {tuple(getattr(shape, axis) for axis in axes) for shape in shapes} == maximal
    parameters = [shape.parameters() for shape in shapes]
    assert parameters == sorted(parameters, reverse=True)


def test_sizes_are_multiples_of_the_tensor_parallel_size() -> None:
    space = dataclasses.replace(COARSE, tensor_model_parallel_size=16, prune_heads=True)
    teacher = dataclasses.replace(QWEN3_8B, num_query_groups=16, num_attention_heads=48)
    shapes = enumerate_shapes(teacher, space, {"parameters": 6e9}, Service())
    # Multiples of 16 from 0.6 * 48 = 28.8 heads on.
    assert {shape.num_attention_heads for shape in shapes} == {32, 48}
    space = dataclasses.replace(space, tensor_model_parallel_size=3)
    shapes = enumerate_shapes(teacher, space, {"parameters": 6e9}, Service())
    assert shapes
    for shape in shapes:
        sizes = (shape.num_attention_heads, shape.hidden_size, shape.ffn_hidden_size)
        assert all(size % 3 == 0 for size in sizes)


def test_costs_of_serving() -> None:
    """Costs of Llama 3 70B, by default in bfloat16 and with 4096 tokens of context per request."""
    service = Service(batch_size=2)
    assert weight_bytes(LLAMA_70B, service) == pytest.approx(141.1e9, rel=1e-3)
    # Two requests, keys and values, layers, query groups, channels, tokens, bytes of a value.
    assert cache_bytes(LLAMA_70B, service) == 2 * 2 * 80 * 8 * 128 * 4096 * 2
    assert memory_bytes(LLAMA_70B, service) == weight_bytes(LLAMA_70B, service) + cache_bytes(
        LLAMA_70B, service
    )
    # A decoding step reads the cache and all weights except the input embedding. At batch size 2,
    # the H100's bandwidth of 3.35e12 bytes/s limits the step.
    bytes_read = 2 * (LLAMA_70B.parameters() - 128256 * 8192) + cache_bytes(LLAMA_70B, service)
    assert latency_ms(LLAMA_70B, service) == pytest.approx(1e3 * bytes_read / 3.35e12, rel=1e-3)
    # In int4, 64 weights share a scale and a zero point of together 20 bits, that is, 20 / 64 bits
    # per weight. Weights of the embedding and the head have 8 bits.
    embedding_and_head = 2 * 128256 * 8192
    layers = LLAMA_70B.parameters() - embedding_and_head
    int4_bits = (4 + 20 / 64) * layers + 8 * embedding_and_head
    int4 = Service(backend="openvino", precision="int4")
    assert weight_bytes(LLAMA_70B, int4) == pytest.approx(int4_bits / 8)
    # In FP8, the embedding and the head stay in bfloat16.
    fp8_bits = 8 * layers + 16 * embedding_and_head
    assert weight_bytes(LLAMA_70B, Service(precision="fp8")) == pytest.approx(fp8_bits / 8)
    # For a large batch with short contexts, FLOPs limit the step: two per weight and request, at
    # the H100's 9.89e14 FLOP/s.
    large_batch = dataclasses.replace(service, batch_size=4096, context_length=1)
    flops = 4096 * 2 * (LLAMA_70B.parameters() - 128256 * 8192)
    assert latency_ms(LLAMA_70B, large_batch) == pytest.approx(1e3 * flops / 9.89e14, rel=1e-2)


def test_a_latency_model_is_fitted_and_limits_shapes() -> None:
    """A step takes 2 ms, plus 0.1 ms per layer and 20 ms per 10⁹ bytes."""
    exact, service = LatencyFit(2.0, 0.1, 20.0), Service(precision="fp32", context_length=256)
    shapes = corner_shapes(SMOLLM2, Space(prune_heads=True))
    # The teacher, four shapes with one axis at its minimum, and one with all axes at theirs.
    assert len(shapes) == 6
    step_times = [latency_ms(s, dataclasses.replace(service, measured=exact)) for s in shapes]
    # The first shape is the teacher, whose 30 layers take 3 ms.
    assert step_times[0] == pytest.approx(2 + 3 + 20 * gigabytes_per_step(SMOLLM2, service))
    fit = fit_latency(shapes, step_times, service)
    assert dataclasses.astuple(fit) == pytest.approx(dataclasses.astuple(exact), rel=1e-3)
    measured = dataclasses.replace(service, measured=fit)
    fast_shapes = enumerate_shapes(SMOLLM2, Space(), {"latency_ms": 0.8}, measured)
    # The fixed 2 ms of a step remain. So parameters must fall by more than 20% of the teacher's.
    assert max(shape.parameters() for shape in fast_shapes) < 0.8 * SMOLLM2.parameters()
    assert all(latency_ms(shape, measured) <= 0.8 * step_times[0] for shape in fast_shapes)
    # Without the fit, latency comes from the roofline, and other shapes are within the budget.
    assert fast_shapes != enumerate_shapes(SMOLLM2, Space(), {"latency_ms": 0.8}, service)
    # A throughput of two tokens (one per request) in 0.8 of the teacher's step is the same budget.
    two_requests = dataclasses.replace(measured, batch_size=2)
    rate = 2e3 / (0.8 * latency_ms(SMOLLM2, two_requests))  # tokens per second; steps are in ms
    by_rate, by_latency = (
        enumerate_shapes(SMOLLM2, Space(), budget, two_requests)
        for budget in ({"tokens_per_second": rate}, {"latency_ms": 0.8})
    )
    assert by_rate == by_latency


def test_fitted_times_are_not_negative() -> None:
    """Noise can make shapes with fewer layers look slower. Here a layer saves 0.01 ms."""
    shapes, service = corner_shapes(SMOLLM2, Space()), Service()
    step_times = [10 * gigabytes_per_step(s, service) - 0.01 * s.num_layers for s in shapes]
    fit = fit_latency(shapes, step_times, service)
    assert min(dataclasses.astuple(fit)) >= 0
    assert fit.gigabyte_ms > 0


def test_latency_that_does_not_depend_on_size_is_refused() -> None:
    """The teacher is the first shape, and the fastest here. The smallest, the last, is slowest."""
    shapes = corner_shapes(SMOLLM2, Space())
    step_times = [3.0 + 0.1 * index for index in range(len(shapes))]
    with pytest.raises(RecipeError, match="smaller engines were not faster"):
        fit_latency(shapes, step_times, Service())


def test_the_smallest_allowed_size_is_listed() -> None:
    """In floating point, 30 * (1 - 0.7) is slightly more than 9, but 9 layers are allowed."""
    shapes = corner_shapes(SMOLLM2, Space(max_depth_pruning=0.7))
    assert min(shape.num_layers for shape in shapes) == 9


def test_the_middle_is_between_the_corners() -> None:
    """The smallest allowed shape has 18 of 30 layers and hidden size 384 of 576."""
    shape = middle_shape(SMOLLM2, Space())
    assert 18 < shape.num_layers < 30
    assert 384 < shape.hidden_size < 576
