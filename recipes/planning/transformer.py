"""FLOPs, bytes and memory of a transformer, in closed form and without torch.

- A weight takes 2 FLOPs per token forward and 4 backward (Kaplan et al., arXiv:2001.08361). Causal
  attention computes half of the s scores of a token: 2·s·heads·head_size FLOPs per layer forward.
- Activations are the tensors that Megatron keeps for the backward pass (Korthikanti et al.,
  arXiv:2205.05198), with gated feed-forward layers, RMSNorm and attention that stores no scores.
- Memory traffic is the bytes that operations between GEMMs read and write. Its constants were
  counted by hand in ``recipes.backend.local_layers``, Megatron and ``recipes.distillation.losses``.
  Only time estimates for CPUs use it: on GPUs, kernels fuse most of these operations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_convert.architecture import Architecture
from nemo_convert.pipeline import pipeline_split
from recipes.backend.device import QUERIES_AT_ONCE
from recipes.planning.workload import ONE_MODEL_LOSS_BUFFERS, Layout, Workload

LOSS_CHUNK_BYTES = 512 << 20
"""Largest float32 buffer of the loss on a GPU, in bytes: large enough to keep the GPU busy."""
LOGITS_BYTES = 128 << 20
"""Bytes of float32 logits that exist at once in an evaluation pass."""
FORWARDS_PER_BACKWARD = 2
"""FLOPs of a backward pass, divided by those of a forward pass."""
ATTENTION_FORWARD_FLOPS, ATTENTION_BACKWARD_FLOPS = 4, 10
"""FLOPs per score and channel of a head: 2 for each of 2 forward GEMMs and of 5 backward GEMMs. One
backward GEMM recomputes the scores."""
FRAGMENTATION = 1.05
"""Memory that the allocator holds, divided by the memory of tensors. Assumed, not measured."""


@dataclass(frozen=True)
class Compute:
    """Work that a device does: FLOPs and memory traffic, for one token or summed over tokens."""

    gemm_flops: float = 0
    """FLOPs of linear layers."""
    attention_flops: float = 0
    """FLOPs of causal attention, without masked scores."""
    blocked_attention_flops: float = 0
    """FLOPs of attention on a CPU: in blocks of queries, which also compute some masked scores."""
    bytes: float = 0
    """Memory traffic of the operations between GEMMs."""
    layer_passes: float = 0
    """Passes of a micro batch through one layer; a backward pass counts twice."""

    @property
    def flops(self) -> float:
        """FLOPs without masked scores, as publications count them."""
        return self.gemm_flops + self.attention_flops

    def __add__(self, other: Compute) -> Compute:
        return Compute(*(value + vars(other)[name] for name, value in vars(self).items()))

    def __mul__(self, factor: float) -> Compute:
        return Compute(*(factor * value for value in vars(self).values()))


# FLOPs and memory traffic of a token


def pass_compute(arch: Architecture, seq_length: int, dtype_bytes: int, passes: int = 1) -> Compute:
    """Returns FLOPs and memory traffic of one token in a model's forward and backward passes.

    ``passes`` is 1 for a forward pass, and 3 with a backward pass, which counts twice. It is 4 if
    full recomputation also repeats the forward pass. ``dtype_bytes`` is the size of an activation.
    """
    has_backward = passes > 1
    forwards = passes - FORWARDS_PER_BACKWARD if has_backward else passes
    traffic = forwards * _forward_bytes(arch, dtype_bytes)
    flops_per_score = ATTENTION_FORWARD_FLOPS * forwards
    if has_backward:
        traffic += _backward_bytes(arch, seq_length, dtype_bytes)
        flops_per_score += ATTENTION_BACKWARD_FLOPS
    score_channels = seq_length * arch.num_attention_heads * arch.kv_channels * arch.num_layers
    blocked_flops = flops_per_score * score_channels * _computed_score_fraction(seq_length)
    return Compute(
        gemm_flops=passes * 2 * arch.active_weights(),
        attention_flops=passes * 2 * score_channels,  # 4 FLOPs a score; half are masked
        blocked_attention_flops=blocked_flops,
        bytes=arch.num_layers * traffic,
    )


def forward_flops(arch: Architecture, seq_length: int) -> float:
    """Returns the FLOPs of a token's forward pass in a sequence of ``seq_length`` tokens."""
    return pass_compute(arch, seq_length, dtype_bytes=2).flops  # the dtype changes only traffic


def head_flops(arch: Architecture) -> int:
    """Returns the FLOPs of a token's forward pass through the output layer."""
    return 2 * arch.vocab_size * arch.hidden_size


def feed_forward_recompute(arch: Architecture, dtype_bytes: int) -> Compute:
    """Returns the cost of recomputing a token's feed-forward activations in all layers."""
    width = arch.num_layers * feed_forward_width(arch)
    flops = 2 * 3 * arch.hidden_size * width  # in three GEMMs: gate, up and down projection
    return Compute(gemm_flops=flops, bytes=5 * dtype_bytes * width)  # as in ``_forward_bytes``


def least_squares_flops(teacher: Architecture, student: Architecture) -> float:
    """Returns the FLOPs per token of summing a student's normal equations for least squares.

    A token with n inputs x and m targets y adds x·xᵀ and x·yᵀ, which take 2·n·(n + m) FLOPs.
    """
    shapes = least_squares_shapes(teacher, student)
    return 2.0 * student.num_layers * sum(n * (n + m) for n, m in shapes)


def least_squares_shapes(teacher: Architecture, student: Architecture) -> list[tuple[int, int]]:
    """Returns the numbers of inputs and targets of a layer's four least-squares problems.

    The problems are for both norms, the attention's output projection and the down projection.
    """
    width, (queries, _) = student.hidden_size, _attention_widths(student)
    norm = (width, teacher.hidden_size)
    return [norm, norm, (queries, width), (student.ffn_hidden_size, width)]


def feed_forward_width(arch: Architecture) -> int:
    """Returns how many feed-forward channels one token uses in a layer."""
    if not arch.num_moe_experts:
        return arch.ffn_hidden_size
    experts = arch.moe_router_topk * arch.moe_ffn_hidden_size
    return experts + arch.moe_shared_expert_intermediate_size


def _computed_score_fraction(seq_length: int) -> float:
    """Returns the fraction of the attention matrix that a CPU computes, in blocks of queries.

    It computes the half below the diagonal, and the masked half of each block on the diagonal.
    """
    return (1 + min(1, QUERIES_AT_ONCE / seq_length)) / 2


# From here to ``scoring_bytes``, constants are bytes that operations read or write per channel.


def _forward_bytes(arch: Architecture, dtype_bytes: int) -> float:
    """Returns a token's memory traffic in a layer's forward pass. Attention stores no scores."""
    queries, keys = _attention_widths(arch)
    norm, rope = (22 if dtype_bytes == 2 else 20), 12 * dtype_bytes  # norms compute in float32
    return (
        arch.hidden_size * 2 * (norm + 3 * dtype_bytes)  # two norms and residual additions
        + queries * (rope + 6 * dtype_bytes)  # with keys and values, copied for each query head
        + keys * (rope + 2 * dtype_bytes)
        + feed_forward_width(arch) * 5 * dtype_bytes
    )


def _backward_bytes(arch: Architecture, seq_length: int, dtype_bytes: int) -> float:
    """Returns a token's memory traffic in a layer's backward pass. Scores are in float32."""
    queries, keys = _attention_widths(arch)
    scores = arch.num_attention_heads * seq_length * _computed_score_fraction(seq_length)
    cast = 6 if dtype_bytes == 2 else 0  # reads and writes of a conversion to or from float32
    norm, rope = 60 + 4 * dtype_bytes, 14 * dtype_bytes
    return (
        arch.hidden_size * 2 * (norm + 3 * dtype_bytes)
        + queries * (rope + 6 * dtype_bytes + 16 + cast)
        + keys * (rope + 4 * dtype_bytes + cast)
        + scores * (12 + 9 * dtype_bytes + cast)
        + feed_forward_width(arch) * 11 * dtype_bytes
    )


def _attention_widths(arch: Architecture) -> tuple[int, int]:
    """Returns the channels of all queries, and of all keys."""
    return arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels


def loss_bytes(vocabulary: int, dtype_bytes: int, terms: int, live_teacher: bool) -> float:
    """Returns a token's memory traffic in the loss on logits and its gradient.

    All ``terms`` of the loss share one log-softmax. Each term after the first adds a gradient.
    """
    student = 52 + 4 * dtype_bytes  # log-softmax, sums, exponentials and the gradient
    teacher = 32 if live_teacher else 0
    return vocabulary * (student + teacher + 20 * (terms - 1))


def scoring_bytes(vocabulary: int) -> float:
    """Returns a token's memory traffic in an evaluation: log-softmax, sums and top-1 token."""
    return 60.0 * vocabulary


# Memory of a rank


@dataclass(frozen=True)
class Memory:
    """Memory of a rank in bytes, by use. ``reserved`` is the memory without any model."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    teacher: float = 0
    activations: float = 0
    logits: float = 0
    reserved: float = 0

    @property
    def total(self) -> float:
        """Sum of all fields, with fragmentation of all but ``reserved``."""
        allocated: float = sum(vars(self).values()) - self.reserved
        return allocated * FRAGMENTATION + self.reserved


def largest(*peaks: Memory) -> Memory:
    """Returns the peak with the highest total."""
    return max(peaks, key=lambda memory: memory.total)


def expert_parameters(arch: Architecture) -> int:
    """Returns the number of parameters of all experts, which expert parallelism splits."""
    per_expert = 3 * arch.hidden_size * arch.moe_ffn_hidden_size  # gate, up and down projection
    return arch.num_layers * arch.num_moe_experts * per_expert


def rank_parameters(arch: Architecture, layout: Layout, stage: int) -> tuple[float, float, float]:
    """Returns the parameters of embeddings, layers and experts on a rank of a pipeline stage.

    The output layer counts as an embedding. The parameters of layers exclude those of experts.
    Megatron holds tied embeddings on both the first and the last stage.
    """
    matrix, experts = arch.vocab_size * arch.hidden_size, expert_parameters(arch)
    layers = arch.parameters() - experts - matrix * (1 if arch.tied_embeddings else 2)
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    matrices = is_first + is_last
    if arch.tied_embeddings:  # if there is only one stage, it holds the matrix once
        matrices = int(is_first or is_last)
    fraction = pipeline_split(arch.num_layers, layout.pipeline)[stage] / arch.num_layers
    split_experts = experts * fraction / (layout.tensor * layout.expert)
    return matrix * matrices / layout.tensor, layers * fraction / layout.tensor, split_experts


def layer_activation_bytes(arch: Architecture, layout: Layout, tokens: float) -> float:
    """Returns the bfloat16 bytes that a layer's forward pass keeps for the backward pass.

    - Both norms keep inputs and outputs. Only sequence parallelism splits them over ranks.
    - Attention keeps queries, keys, values and its output; queries and keys also before their norm.
    - The feed-forward layer keeps gate, up projection and their product.
    - Experts also keep a copy of the product, scaled by the router's probability, and their inputs.
      Tensor parallelism does not split these inputs.
    - A feed-forward layer or expert that is recomputed keeps nothing.
    """
    norms = 4 * arch.hidden_size
    # The output is as wide as the queries, and the values are as wide as the keys.
    attention = (3 if arch.qk_layernorm else 2) * sum(_attention_widths(arch))
    expert_inputs = arch.moe_router_topk * arch.hidden_size
    feed_forward = 3 * feed_forward_width(arch) + arch.moe_router_topk * arch.moe_ffn_hidden_size
    if layout.recompute_feed_forward:
        expert_inputs = feed_forward = 0
    split_by_tensor = (attention + feed_forward) / layout.tensor
    return 2 * tokens * (norms / layout.sequence_shards + expert_inputs + split_by_tensor)


def peak_activation_bytes(workload: Workload, stage: int, tokens: float) -> float:
    """Returns the bytes of a training run's activations at their peak (bfloat16, 1F1B schedule).

    Adds up the activations of the micro batches in flight and of the current operation. On the last
    stage, this operation is the loss, with input and output of the last norm. On the other stages,
    it is a layer of the teacher or of a backward pass. Each of several stages also has buffers for
    hidden states of both models from its neighbours: one per micro batch in flight, and one more.

    ``stage`` counts pipeline stages from 0. ``tokens`` are those of a micro batch on a rank.
    """
    arch, layout = workload.trained, workload.layout
    assert arch is not None
    layer = layer_activation_bytes(arch, layout, tokens)
    layers = pipeline_split(arch.num_layers, layout.pipeline)[stage]
    in_flight = min(layout.pipeline - stage, workload.micro_batches)
    hidden_state = 2 * tokens * arch.hidden_size
    shards = layout.sequence_shards
    buffers = hidden_state if shards > 1 else 0.0  # Megatron keeps the buffer of the all-gather
    if layout.pipeline > 1:
        width = arch.hidden_size + (workload.teacher.hidden_size if workload.teacher else 0)
        received = in_flight if stage > 0 else 0  # the first stage receives no forward activations
        buffers += (received + 1) * 2 * tokens * width / shards
    if layout.recompute_granularity == "full":  # a layer in flight keeps only its input
        return in_flight * layers * hidden_state / shards + layer + buffers
    current = 2 * hidden_state / shards if stage == layout.pipeline - 1 else layer
    if layout.recompute_feed_forward:
        full = layer_activation_bytes(arch, replace(layout, recompute_feed_forward=False), tokens)
        recomputed = full - layer  # one layer at a time
        current = max(current, recomputed)
    return in_flight * layers * layer + current + buffers


def training_logits_bytes(workload: Workload, on_gpu: bool, tokens: float) -> float:
    """Returns the bytes of the student's and a live teacher's logits, and of the loss's buffers.

    The gradient overwrites the student's logits. ``tokens`` are those of a micro batch on a rank.
    """
    arch = workload.trained or workload.teacher
    assert arch is not None
    values = tokens * arch.vocab_size / workload.layout.tensor
    chunk = min(LOSS_CHUNK_BYTES, 4 * values) if on_gpu else 0  # chunks on a CPU are negligible
    logits = values * workload.dtype_bytes
    if workload.trained is None:  # holds the teacher's logits twice while Megatron transposes them
        return max(2 * logits, logits + ONE_MODEL_LOSS_BUFFERS * chunk)
    if workload.teacher is None:
        return logits + (ONE_MODEL_LOSS_BUFFERS + workload.terms - 1) * chunk
    return 2 * logits + (workload.loss_buffers + workload.terms - 1) * chunk


def inference_activation_bytes(arch: Architecture, dtype_bytes: int, tokens: int) -> float:
    """Returns a forward pass's peak bytes: 3 tensors of hidden width, 3 of feed-forward width."""
    return dtype_bytes * tokens * 3 * (feed_forward_width(arch) + arch.hidden_size)


# Serving

WEIGHT_BITS = {
    "fp32": 32.0,
    "bf16": 16.0,
    "fp16": 16.0,
    "int8": 8.0,
    "fp8": 8.0,
    "int4": 4.0,
    "int4_awq": 4.0,
}
"""Bits of a weight in a linear layer, without its scale."""
SCALE_BITS = 20.0
"""Bits of the 16-bit scale and the 4-bit zero point of a group of weights."""
BF16_EMBEDDING_FORMATS = ("fp8", "int4_awq")
"""ModelOpt's formats, which leave embedding and head in bfloat16."""


@dataclass(frozen=True)
class Storage:
    """Number formats of an engine's weights and KV cache."""

    precision: str
    """A key of ``WEIGHT_BITS``."""
    group_size: int | None = None
    """Weights that share a scale; ``None`` for one scale per channel, which is not counted."""
    kv_bytes: int = 4
    """Bytes of a value in the KV cache."""

    def layer_bits(self) -> float:
        """Returns the mean bits of a weight in linear layers, including its group's scale."""
        scale = SCALE_BITS / self.group_size if self.group_size else 0.0
        return WEIGHT_BITS[self.precision] + scale

    def embedding_bits(self) -> float:
        """Returns the bits of a weight in embedding and head: at least 8."""
        is_bf16 = self.precision in BF16_EMBEDDING_FORMATS
        return 16.0 if is_bf16 else max(8.0, WEIGHT_BITS[self.precision])


def stored_bytes(arch: Architecture, storage: Storage) -> float:
    """Returns the bytes of all weights and their scales."""
    embeddings = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    layers = arch.parameters() - embeddings
    return (layers * storage.layer_bits() + embeddings * storage.embedding_bits()) / 8


def weight_traffic(arch: Architecture, storage: Storage, tokens: float) -> float:
    """Returns the bytes of weights that a forward pass of ``tokens`` tokens reads.

    An untied embedding does not count: only a few of its rows are read. An MoE's expert is read if
    at least one token is routed to that expert. All experts are assumed to be equally likely.
    """
    embedding = 0 if arch.tied_embeddings else arch.vocab_size * arch.hidden_size
    unread_fraction: float = (1 - arch.moe_router_topk / max(1, arch.num_moe_experts)) ** tokens
    experts = unread_fraction * expert_parameters(arch)  # 0 for a dense model
    unread_bits = embedding * storage.embedding_bits() + experts * storage.layer_bits()
    return stored_bytes(arch, storage) - unread_bits / 8


def kv_cache_bytes(arch: Architecture, tokens: int, storage: Storage) -> int:
    """Returns the bytes of the keys and values of ``tokens`` tokens."""
    _, keys = _attention_widths(arch)
    return 2 * tokens * arch.num_layers * keys * storage.kv_bytes


def prefill_flops(arch: Architecture, batch_size: int, prompt_tokens: int) -> float:
    """Returns the FLOPs of a batch of prompts. Only a prompt's last token needs logits."""
    head = head_flops(arch)
    layers = forward_flops(arch, prompt_tokens) - head  # of one token
    return batch_size * float(prompt_tokens * layers + head)


def decode_flops(arch: Architecture, batch_size: int, context: float) -> float:
    """Returns the FLOPs of one new token for each sequence of a batch, after ``context`` tokens."""
    queries, _ = _attention_widths(arch)
    attention = ATTENTION_FORWARD_FLOPS * arch.num_layers * queries * context
    return batch_size * (2 * arch.active_weights() + attention)


def decode_traffic(arch: Architecture, batch_size: int, context: float, storage: Storage) -> float:
    """Returns the bytes that a decoding step reads: the weights, and each sequence's KV cache."""
    cache = batch_size * context * kv_cache_bytes(arch, tokens=1, storage=storage)
    return weight_traffic(arch, storage, batch_size) + cache
