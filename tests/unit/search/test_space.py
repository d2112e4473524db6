"""Compares listed shapes with all combinations of sizes and a published shape; fits latency."""

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
"""Omits the norms of queries and keys, which are 9,216 of 8 billion parameters."""
LLAMA_70B = Architecture(
    "LlamaForCausalLM", 80, 8192, 28672, 64, 8, 128, 128256, 131072, tied_embeddings=False
)
SMOLLM2 = Architecture(
    "LlamaForCausalLM", 30, 576, 1536, 9, 3, 64, 49152, 8192, tied_embeddings=True
)
COARSE = Space(hidden_size_divisor=256, ffn_hidden_size_divisor=512)


def test_the_published_shape_of_qwen3_is_listed() -> None:
    """A search by NVIDIA/Model-Optimizer for 6B found 30 layers, hidden 3584, ffn 11776."""
    shapes = enumerate_shapes(QWEN3_8B, COARSE, {"parameters": 6e9}, Service())
    published = next(shape for shape in shapes if name_of(shape) == "l30-h3584-f11776-a32")
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
    """Compares with every combination of sizes that are at least 0.6 of the teacher's."""
    space = Space(hidden_size_divisor=96, ffn_hidden_size_divisor=256, prune_heads=True)
    service = Service(context_length=512)
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

    def fits(sizes: tuple[int, ...]) -> bool:
        shape = dataclasses.replace(SMOLLM2, **dict(zip(axes, sizes, strict=True)))
        limits = {n: x * costs[n](SMOLLM2) if x <= 1 else x for n, x in budget.items()}
        return all(costs[name](shape) <= limit for name, limit in limits.items())

    def is_larger(sizes: tuple[int, ...], other: tuple[int, ...]) -> bool:
        return sizes != other and all(a >= b for a, b in zip(sizes, other, strict=True))

    fitting = [sizes for sizes in itertools.product(*axes.values()) if fits(sizes)]
    maximal = {s for s in fitting if not any(is_larger(other, s) for other in fitting)}
    shapes = enumerate_shapes(SMOLLM2, space, budget, service)
    assert {tuple(getattr(shape, axis) for axis in axes) for shape in shapes} == maximal != set()
    parameters = [shape.parameters() for shape in shapes]
    assert parameters == sorted(parameters, reverse=True)


def test_sizes_are_multiples_of_the_tensor_parallel_size() -> None:
    space = dataclasses.replace(COARSE, tensor_model_parallel_size=16, prune_heads=True)
    teacher = dataclasses.replace(QWEN3_8B, num_query_groups=16, num_attention_heads=48)
    shapes = enumerate_shapes(teacher, space, {"parameters": 6e9}, Service())
    assert {shape.num_attention_heads for shape in shapes} == {32, 48}
    space = dataclasses.replace(space, tensor_model_parallel_size=3)
    shapes = enumerate_shapes(teacher, space, {"parameters": 6e9}, Service())
    assert shapes
    for shape in shapes:
        sizes = (shape.num_attention_heads, shape.hidden_size, shape.ffn_hidden_size)
        assert all(size % 3 == 0 for size in sizes)


def test_costs_of_serving() -> None:
    """Llama 3 70B in bfloat16 has 141 GB of weights, and 1.34 GB of KV cache for 4096 tokens."""
    service = Service(batch_size=2)
    assert weight_bytes(LLAMA_70B, service) == pytest.approx(141.1e9, rel=1e-3)
    # Requests, keys and values, layers, query groups, channels, tokens, and bytes of a value.
    assert cache_bytes(LLAMA_70B, service) == 2 * 2 * 80 * 8 * 128 * 4096 * 2
    assert memory_bytes(LLAMA_70B, service) == weight_bytes(LLAMA_70B, service) + cache_bytes(
        LLAMA_70B, service
    )
    # A decoding step reads the cache and all weights except the embedding.
    bytes_read = 2 * (LLAMA_70B.parameters() - 128256 * 8192) + cache_bytes(LLAMA_70B, service)
    assert latency_ms(LLAMA_70B, service) == pytest.approx(1e3 * bytes_read / 3.35e12, rel=1e-3)
    # In int4, 64 weights share a scale and a zero point (20 bits); embedding and head have 8 bits.
    embedding_and_head = 2 * 128256 * 8192
    layers = LLAMA_70B.parameters() - embedding_and_head
    bits = 4 * layers * (1 + 5 / 64) + 8 * embedding_and_head
    int4 = Service(backend="openvino", precision="int4")
    assert weight_bytes(LLAMA_70B, int4) == pytest.approx(bits / 8)
    fp8_bits = 8 * layers + 16 * embedding_and_head
    assert weight_bytes(LLAMA_70B, Service(precision="fp8")) == pytest.approx(fp8_bits / 8)
    # FLOPs limit a large batch with short contexts.
    large_batch = dataclasses.replace(service, batch_size=4096, context_length=1)
    flops = 4096 * 2 * (LLAMA_70B.parameters() - 128256 * 8192)
    assert latency_ms(LLAMA_70B, large_batch) == pytest.approx(1e3 * flops / 9.89e14, rel=1e-2)


def test_a_latency_model_is_fitted_and_limits_shapes() -> None:
    """A step takes 2 ms, plus 0.1 ms per layer and 20 ms per 10⁹ bytes."""
    exact, service = LatencyFit(2.0, 0.1, 20.0), Service(precision="fp32", context_length=256)
    shapes = corner_shapes(SMOLLM2, Space(prune_heads=True))
    assert len(shapes) == 6
    step_times = [latency_ms(s, dataclasses.replace(service, measured=exact)) for s in shapes]
    # The first corner is the teacher, which has 30 layers.
    assert step_times[0] == pytest.approx(2 + 3 + 20 * gigabytes_per_step(SMOLLM2, service))
    latency = fit_latency(shapes, step_times, service)
    assert dataclasses.astuple(latency) == pytest.approx(dataclasses.astuple(exact), rel=1e-3)
    measured = dataclasses.replace(service, measured=latency)
    fast = enumerate_shapes(SMOLLM2, Space(), {"latency_ms": 0.8}, measured)
    # The fixed time of a step does not fall, so bytes must fall by more than the latency.
    assert max(s.parameters() for s in fast) < 0.8 * SMOLLM2.parameters()
    assert all(latency_ms(s, measured) <= 0.8 * step_times[0] for s in fast)
    assert fast != enumerate_shapes(SMOLLM2, Space(), {"latency_ms": 0.8}, service)
    # In each step, each of two simultaneous requests gets a token.
    two_requests = dataclasses.replace(measured, batch_size=2)
    rate = 2e3 / (0.8 * latency_ms(SMOLLM2, two_requests))
    by_rate, by_latency = (
        enumerate_shapes(SMOLLM2, Space(), budget, two_requests)
        for budget in ({"tokens_per_second": rate}, {"latency_ms": 0.8})
    )
    assert by_rate == by_latency


def test_fitted_times_are_not_negative() -> None:
    """Noise can make shapes with fewer layers look slower."""
    shapes, service = corner_shapes(SMOLLM2, Space()), Service()
    step_times = [10 * gigabytes_per_step(s, service) - 0.01 * s.num_layers for s in shapes]
    latency = fit_latency(shapes, step_times, service)
    assert min(dataclasses.astuple(latency)) >= 0
    assert latency.gigabyte_ms > 0


def test_latency_that_does_not_depend_on_size_is_refused() -> None:
    shapes = corner_shapes(SMOLLM2, Space())
    with pytest.raises(RecipeError, match="smaller engines were not faster"):
        fit_latency(shapes, [3.0 + 0.1 * n for n in range(len(shapes))], Service())


def test_the_smallest_allowed_size_is_listed() -> None:
    shapes = corner_shapes(SMOLLM2, Space(max_depth_pruning=0.7))
    assert min(shape.num_layers for shape in shapes) == 9


def test_the_middle_is_between_the_corners() -> None:
    shape = middle_shape(SMOLLM2, Space())
    assert 18 < shape.num_layers < 30
    assert 384 < shape.hidden_size < 576
