"""Cost of forward passes: memory and time of stages that do not train, and of serving.

- A forward pass holds one layer's activations. Logits exist for a few positions at a time and come
  from a float32 copy of the head (``recipes.evaluation.predictions``).
- Importance scores keep the input of every layer. ModelOpt's hooks (``mcore_minitron.py``) hold
  float32 copies of the feed-forward activations and of their absolute values. For an MoE, the
  hooks hold the experts' outputs, also in float32, and Megatron holds two copies of their inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from nemo_convert.architecture import Architecture
from recipes.planning.hardware import STORAGE_BYTES_PER_SECOND, Hardware
from recipes.planning.transformer import (
    LOGITS_BYTES,
    Compute,
    Memory,
    Storage,
    decode_traffic,
    feed_forward_width,
    head_flops,
    inference_activation_bytes,
    kv_cache_bytes,
    largest,
    least_squares_flops,
    least_squares_shapes,
    pass_compute,
    prefill_flops,
    rank_parameters,
    scoring_bytes,
    stored_bytes,
)
from recipes.planning.workload import Layout

COMPARISON_BUFFERS, ONE_MODEL_BUFFERS = 4, 2
"""Number of tensors of ``LOGITS_BYTES`` bytes that are alive at once: in a comparison of two
models, and in one model's loss."""
PARITY_TOKENS = 128
"""Tokens of the text with which a conversion is verified (``nemo_convert.parity``)."""
CONVERSION_COPIES = 4
"""Time of a conversion and its verification, as a multiple of the time to copy the weights."""
SCORED_FRACTION = 0.24
"""Fraction of a benchmark's tokens whose logits are computed; the mean of four benchmarks."""
BENCHMARK_BUFFERS = 3
"""Number of tensors of the logits' size that are alive at once in a benchmark: logits,
log-probabilities and a temporary tensor."""
HEALING_BUFFERS = 5
"""Number of tensors of the teacher's feed-forward width that are alive at once while a layer is
fitted by least squares."""
ENGINE_BUILD_SECONDS = 47e-9
"""Seconds per parameter to convert a checkpoint for TensorRT-LLM 1.2 and to build an engine from
it, on one GPU. Published for Qwen2.5-7B on an RTX 6000 Ada: conversion 120 s, then 236 s in FP8
(https://ai-box.eu/en/top-story-en/tensorrt-llm-in-numbers-fp16-vs-fp8-on-the-rtx-a6000-ada/2266)."""
ABLATED_FRACTION = 0.6
"""Mean cost of measuring the loss without a layer, as a fraction of a forward pass. Only the layers
after the removed layer, and the head, run again."""


@dataclass(frozen=True)
class InferenceCost:
    """Cost of a stage that runs models and has no ``Workload``: it searches or does not train."""

    memory: Memory
    """Memory of the rank that needs the most."""
    compute: Compute
    """FLOPs and memory traffic of one replica of the model; replicas run at the same time. Adds up
    the work of the replica's pipeline ranks, because these compute in turn."""
    bf16: bool
    """Whether models compute in bfloat16 instead of float32."""
    generated_bytes: float = 0
    """Bytes of weights and KV cache that all decoding steps of text generation read."""
    extra_seconds: float = 0
    """Seconds in addition to those of ``compute``: of a search's trainings on GPUs (on a CPU,
    ``compute`` includes them), of a conversion, or of building a TensorRT engine."""
    stopping_seconds: float | None = None
    """Seconds that the stage may need to stop at a deadline; ``None`` if it cannot stop there."""
    ranks_on_node: int = 1
    """Ranks that compute at the same time, and on CPUs share the node's rates and memory."""
    keeps_answers: bool = False
    """Whether the stage, if it is started again, skips the benchmark tasks that it completed."""

    def hours(self, hardware: Hardware) -> float:
        """Returns the hours on a hardware profile. Only memory traffic counts in decoding steps."""
        ranks = self.ranks_on_node
        seconds = hardware.compute_seconds(self.compute, self.bf16, ranks) + self.extra_seconds
        generated_bytes = self.generated_bytes * (1 if hardware.on_gpu else ranks)
        return (seconds + generated_bytes / hardware.bytes_per_second) / 3600


@dataclass(frozen=True)
class Sequences:
    """Sequences of text on which models run forward passes."""

    number: float  # not always an integer: may be a mean over ranks
    seq_length: int
    micro_batch_size: int
    scored_fraction: float = 1.0
    """Fraction of the tokens whose logits are computed."""

    @property
    def tokens(self) -> float:
        """Tokens of the text."""
        return self.number * self.seq_length

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a forward pass."""
        return ceil(min(self.micro_batch_size, self.number)) * self.seq_length

    def compute(self, arch: Architecture, bf16: bool) -> Compute:
        """Returns FLOPs and memory traffic of a model's forward passes over all sequences."""
        per_token = pass_compute(arch, self.seq_length, _value_bytes(bf16))
        # ``pass_compute`` counts the head for every token. The negative FLOPs below subtract the
        # head of the tokens without logits.
        per_token += Compute(
            gemm_flops=(self.scored_fraction - 1) * head_flops(arch),
            bytes=self.scored_fraction * scoring_bytes(arch.vocab_size),
            layer_passes=arch.num_layers / max(1, self.micro_batch_tokens),
        )
        return per_token * self.tokens


def comparison_cost(
    models: Sequence[Architecture], bf16: bool, text: Sequences, hardware: Hardware
) -> InferenceCost:
    """Returns the cost of running models one after the other and comparing them with the first.

    The last hidden states and the head of each model stay in memory until the comparison.
    """
    value_bytes, reserved = _value_bytes(bf16), hardware.reserved_bytes
    # Bytes of output heads and last hidden states of the models that have run so far.
    heads = states = 0.0
    peaks = []
    for arch in models:
        states += _state_bytes(arch, value_bytes, text, hardware)
        activations = inference_activation_bytes(arch, value_bytes, text.micro_batch_tokens)
        peaks.append(
            Memory(
                weights=value_bytes * arch.parameters() + heads + _head_bytes(arch, bf16),
                activations=activations + states,
                reserved=reserved,
            )
        )
        heads += _float32_head_bytes(arch)
    logits = _logits_bytes(models[0], text.tokens, COMPARISON_BUFFERS)
    comparison = Memory(weights=heads, activations=states, logits=logits, reserved=reserved)
    return InferenceCost(largest(*peaks, comparison), _all_passes(models, bf16, text), bf16)


def ranking_cost(
    teacher: Architecture, bf16: bool, text: Sequences, hardware: Hardware, healed: bool
) -> InferenceCost:
    """Returns the memory of comparing a candidate with the teacher, and the teacher's FLOPs.

    The caller adds the FLOPs of the candidates, which are compared one after the other. A pruned
    candidate takes no memory, because its weights are views of the teacher's weights. A ``healed``
    candidate (reconstructed by least squares) has its own weights, counted as large as the
    teacher's. In memory they replace the teacher's weights, except for the teacher's head.
    """
    value_bytes = _value_bytes(bf16)
    states = 2 * _state_bytes(teacher, value_bytes, text, hardware)  # of both models
    # In bfloat16, each model needs a float32 copy of its head. In float32, no copy is needed, but
    # the teacher's head stays in memory in addition to a healed candidate.
    heads = (2 if bf16 else int(healed)) * _float32_head_bytes(teacher)
    resident = Memory(
        weights=value_bytes * teacher.parameters() + heads,
        activations=states,
        reserved=hardware.reserved_bytes,
    )
    layer = inference_activation_bytes(teacher, value_bytes, text.micro_batch_tokens)
    memory = largest(
        replace(resident, activations=states + layer),
        replace(resident, logits=_logits_bytes(teacher, text.tokens, COMPARISON_BUFFERS)),
    )
    return InferenceCost(memory, text.compute(teacher, bf16), bf16)


def healing_cost(
    teacher: Architecture, student: Architecture, text: Sequences, hardware: Hardware
) -> InferenceCost:
    """Returns the cost of the stage ``heal``: least squares, layer by layer.

    For each token of the text, memory holds in float32: both models' residual streams, raw and
    normalised, and the inputs of the student's down projection. On a CPU, memory also holds both
    models in bfloat16.

    A problem with n inputs and m targets sums float64 matrices of n·n and n·m values. The solver
    holds four float64 matrices of n·n (the sum, the damping, both added, the Cholesky factor), and
    three of n·m (in float64 the sum and the result, in float32 the result).
    """
    models = (teacher, student)
    token_values = sum(2 * arch.hidden_size for arch in models) + feed_forward_width(student)
    stream_bytes = 4 * text.tokens * token_values
    buffer_values = text.micro_batch_tokens * HEALING_BUFFERS * feed_forward_width(teacher)
    # Parameters of one layer of each model. The embeddings are divided among the layers.
    layer_parameters = sum(arch.parameters() / arch.num_layers for arch in models)
    host_bytes = 0 if hardware.on_gpu else 2 * sum(arch.parameters() for arch in models)
    shapes = least_squares_shapes(teacher, student)
    summing_bytes = 4 * buffer_values + max(8 * n * (n + m) for n, m in shapes)
    solving_bytes = max(4 * 8 * n * n + (8 + 8 + 4) * n * m for n, m in shapes)
    memory = Memory(
        weights=4 * layer_parameters + host_bytes,
        activations=stream_bytes + max(summing_bytes, solving_bytes),
        reserved=hardware.reserved_bytes,
    )
    fit = Compute(gemm_flops=least_squares_flops(teacher, student)) * text.tokens
    text_without_logits = replace(text, scored_fraction=0)
    compute = fit + _all_passes(models, bf16=False, text=text_without_logits)
    return InferenceCost(memory, compute, bf16=False)


def ablation_passes(layers: int, sequences: int, block_sizes: Iterable[int]) -> int:
    """Returns the number of forward passes in which each layer and each block is left out once."""
    # A block of ``size`` layers can start at ``layers - size + 1`` positions.
    return sequences * sum(layers - size + 1 for size in (1, *block_sizes))


def scoring_cost(
    arch: Architecture,
    bf16: bool,
    text: Sequences,
    hardware: Hardware,
    pipeline: int = 1,
    ablation_passes: float = 0,
) -> InferenceCost:
    """Returns the cost of the importance scores of a model on a calibration text.

    Each of the ``pipeline`` stages is on one rank. ``ablation_passes`` is the number of forward
    passes without a layer or block, per data-parallel rank.
    """
    value_bytes, tokens = _value_bytes(bf16), text.micro_batch_tokens
    layout = Layout(devices=pipeline, pipeline=pipeline)
    parameters = max(sum(rank_parameters(arch, layout, stage)) for stage in range(pipeline))
    # The inputs of all layers of the longest pipeline stage, and the last layer's output.
    states = (ceil(arch.num_layers / pipeline) + 1) * value_bytes * tokens * arch.hidden_size
    # While a hook runs, the residual stream and the feed-forward layer's input are also in memory.
    hook_bytes = tokens * 2 * value_bytes * arch.hidden_size
    if arch.num_moe_experts:  # two copies of inputs, and outputs also in float32 (4 bytes)
        hook_bytes += tokens * arch.moe_router_topk * (3 * value_bytes + 4) * arch.hidden_size
    else:  # activations, also in float32, and their absolute values in float32
        hook_bytes += tokens * (value_bytes + 8) * arch.ffn_hidden_size
    resident = Memory(
        weights=value_bytes * parameters + _head_bytes(arch, bf16),
        activations=states,
        reserved=hardware.reserved_bytes,
    )
    layer = inference_activation_bytes(arch, value_bytes, tokens)
    memory = largest(
        replace(resident, activations=states + max(layer, hook_bytes)),
        replace(resident, logits=_logits_bytes(arch, tokens, ONE_MODEL_BUFFERS)),
    )
    ablations = replace(text, number=ABLATED_FRACTION * ablation_passes)
    return InferenceCost(memory, text.compute(arch, bf16) + ablations.compute(arch, bf16), bf16)


def serving_cost(
    arch: Architecture,
    requests: Sequence[tuple[int, int]],
    new_tokens: int,
    storage: Storage,
    devices: int,
) -> InferenceCost:
    """Returns a lower bound of the cost per device of serving batches one after the other.

    ``requests`` has the number of sequences, and of prompt tokens per sequence, of each batch. Each
    sequence then generates ``new_tokens`` tokens. The model is split over ``devices``.
    """
    flops = sum(prefill_flops(arch, batch, prompt) for batch, prompt in requests)
    traffic = sum(
        # A decoding step's mean context is the prompt and half of the new tokens.
        new_tokens * decode_traffic(arch, batch, prompt + new_tokens / 2, storage)
        for batch, prompt in requests
    )
    tokens = max(batch * (prompt + new_tokens) for batch, prompt in requests)  # the largest batch
    memory = Memory(
        weights=stored_bytes(arch, storage) / devices,
        activations=kv_cache_bytes(arch, tokens, storage) / devices,
    )
    bf16 = storage.precision != "fp32"
    return InferenceCost(memory, Compute(gemm_flops=flops / devices), bf16, traffic / devices)


@dataclass(frozen=True)
class DecodingSteps:
    """The decoding steps in which a model generates text."""

    steps: float
    """Number of decoding steps, summed over all batches."""
    batch_size: int
    context: float
    """Mean number of tokens of a sequence before a step."""


def benchmark_cost(
    models: Sequence[Architecture],
    bf16: bool,
    tokens: float,
    pass_tokens: int,
    hardware: Hardware,
    generations: Sequence[DecodingSteps] = (),
) -> InferenceCost:
    """Returns the cost of evaluating each model on the benchmark items of one rank.

    The items have ``tokens`` tokens in total. A forward pass has ``pass_tokens`` tokens, whose
    logits are all in memory at once. Each model also runs the ``generations``.
    """
    largest_model = max(models, key=lambda arch: arch.parameters())
    value_bytes = _value_bytes(bf16)
    memory = Memory(
        weights=value_bytes * largest_model.parameters() + _head_bytes(largest_model, bf16),
        activations=inference_activation_bytes(largest_model, value_bytes, pass_tokens),
        logits=BENCHMARK_BUFFERS * 4 * pass_tokens * largest_model.vocab_size,
        reserved=hardware.reserved_bytes,
    )
    items = Sequences(tokens / pass_tokens, pass_tokens, 1, scored_fraction=SCORED_FRACTION)
    storage = Storage("bf16" if bf16 else "fp32", kv_bytes=value_bytes)
    generated = sum(
        decoding.steps * decode_traffic(arch, decoding.batch_size, decoding.context, storage)
        for decoding in generations
        for arch in models
    )
    return InferenceCost(memory, _all_passes(models, bf16, items), bf16, generated)


def conversion_cost(arch: Architecture, hardware: Hardware) -> InferenceCost:
    """Returns the cost of converting a bfloat16 model. The conversion is verified in float32."""
    memory = Memory(
        weights=4 * arch.parameters(),
        logits=4 * PARITY_TOKENS * arch.vocab_size,
        reserved=hardware.reserved_bytes,
    )
    seconds = CONVERSION_COPIES * 2 * arch.parameters() / STORAGE_BYTES_PER_SECOND
    return InferenceCost(memory, Compute(), bf16=False, extra_seconds=seconds)


def engine_build_cost(arch: Architecture, storage: Storage, devices: int) -> InferenceCost:
    """Returns the time of building a TensorRT engine, and the memory of its weights per device."""
    memory = Memory(weights=stored_bytes(arch, storage) / devices)
    seconds = ENGINE_BUILD_SECONDS * arch.parameters()
    return InferenceCost(memory, Compute(), bf16=True, extra_seconds=seconds)


def quantization_cost(arch: Architecture, seq_length: int, hardware: Hardware) -> InferenceCost:
    """Returns the memory, not the time, of comparing a quantized model with the original."""
    memory = Memory(  # ModelOpt simulates the quantization, so both models have the same size
        weights=2 * (2 * arch.parameters() + _float32_head_bytes(arch)),
        activations=inference_activation_bytes(arch, 2, seq_length),
        logits=_logits_bytes(arch, seq_length, COMPARISON_BUFFERS),
        reserved=hardware.reserved_bytes,
    )
    return InferenceCost(memory, Compute(), bf16=True)


def _value_bytes(bf16: bool) -> int:
    return 2 if bf16 else 4


def _all_passes(models: Sequence[Architecture], bf16: bool, text: Sequences) -> Compute:
    return sum((text.compute(arch, bf16) for arch in models), Compute())


def _state_bytes(
    arch: Architecture, value_bytes: int, text: Sequences, hardware: Hardware
) -> float:
    """Returns the bytes of last hidden states on a device: 0 on a GPU, as the host keeps them."""
    return 0 if hardware.on_gpu else value_bytes * text.tokens * arch.hidden_size


def _head_bytes(arch: Architecture, bf16: bool) -> int:
    """Returns the bytes of a bfloat16 head's float32 copy; a float32 head needs none."""
    return _float32_head_bytes(arch) if bf16 else 0


def _float32_head_bytes(arch: Architecture) -> int:
    return 4 * arch.vocab_size * arch.hidden_size


def _logits_bytes(arch: Architecture, tokens: float, buffers: int) -> float:
    """Returns the bytes of ``buffers`` float32 tensors of logits, each at most ``LOGITS_BYTES``."""
    return buffers * min(LOGITS_BYTES, 4 * tokens * arch.vocab_size)
