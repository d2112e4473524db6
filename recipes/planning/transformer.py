"""FLOPs, bytes and memory of a transformer, in closed form and without torch.

- A weight takes 2 FLOPs per token forward and 4 backward (Kaplan et al., arXiv:2001.08361). Causal
  attention computes half of the scores: 2·s·heads·channels FLOPs per layer and token.
- Activations are those that Megatron keeps of a layer (Korthikanti et al., arXiv:2205.05198), for
  gated feed-forward layers, RMSNorm and attention that never stores its scores.
- Memory traffic is what the operations between GEMMs read and write in
  ``recipes.backend.local_layers``, Megatron's layers and ``recipes.distillation.losses``. A GPU's
  kernels fuse most of them, so it counts only on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_convert.architecture import Architecture
from nemo_convert.pipeline import pipeline_split
from recipes.backend.device import QUERIES_AT_ONCE
from recipes.planning.workload import Layout, Workload

LOSS_CHUNK_BYTES = 512 << 20
"""Size of a float32 buffer of the loss on a GPU: enough to occupy it."""
LOGITS_BYTES = 128 << 20
"""Size of the float32 logits that exist at once in an evaluation pass."""
BACKWARD = 2
"""FLOPs of a backward pass over those of a forward pass."""
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10
"""FLOPs of attention per channel and key: two GEMMs, and five, one of which is recomputed."""
FRAGMENTATION = 1.05
"""Memory that an allocator holds over what is used; an assumption."""
TWO_MODEL_BUFFERS, ONE_MODEL_BUFFERS = 3, 2
"""Buffers of the loss that are alive at once: with a live teacher, and without."""


@dataclass(frozen=True)
class Compute:
    """Work of a device for one token, or for many."""

    gemm_flops: float = 0
    """FLOPs of linear layers."""
    attention_flops: float = 0
    """FLOPs of causal attention."""
    blocked_attention_flops: float = 0
    """FLOPs of attention on a CPU, in blocks that extend beyond the diagonal."""
    bytes: float = 0
    """Memory traffic between GEMMs."""
    layer_passes: float = 0
    """Passes of a micro batch through a layer; a backward pass counts twice."""

    @property
    def flops(self) -> float:
        """FLOPs as they are usually counted."""
        return self.gemm_flops + self.attention_flops

    def __add__(self, other: Compute) -> Compute:
        return Compute(*(mine + vars(other)[name] for name, mine in vars(self).items()))

    def __mul__(self, number: float) -> Compute:
        return Compute(*(number * value for value in vars(self).values()))


# FLOPs and memory traffic of a token


def pass_compute(arch: Architecture, seq_length: int, dtype_bytes: int, passes: int = 1) -> Compute:
    """Computes what a token's passes through a model take.

    ``passes`` is 1 forward, 3 with a backward pass, and 4 with a forward pass that is recomputed.
    """
    backward = passes > 1
    forwards = passes - BACKWARD if backward else passes
    per_key = FORWARD_FLOPS * forwards + BACKWARD_FLOPS * backward
    area = seq_length * arch.num_attention_heads * arch.kv_channels * arch.num_layers
    traffic = forwards * _forward_bytes(arch, dtype_bytes)
    if backward:
        traffic += _backward_bytes(arch, seq_length, dtype_bytes)
    return Compute(
        gemm_flops=passes * 2 * arch.active_weights(),
        attention_flops=passes * 2 * area,
        blocked_attention_flops=per_key * area * _computed_scores(seq_length),
        bytes=arch.num_layers * traffic,
    )


def forward_flops(arch: Architecture, seq_length: int) -> float:
    """FLOPs of a token's forward pass in a sequence of ``seq_length`` tokens."""
    return pass_compute(arch, seq_length, 2).flops


def head_flops(arch: Architecture) -> int:
    """FLOPs of a token in the head."""
    return 2 * arch.vocab_size * arch.hidden_size


def feed_forward_recompute(arch: Architecture, dtype_bytes: int) -> Compute:
    """Returns the work to recompute a token's feed-forward activations."""
    width = arch.num_layers * feed_forward_width(arch)
    return Compute(gemm_flops=6 * arch.hidden_size * width, bytes=5 * dtype_bytes * width)


def least_squares_flops(teacher: Architecture, student: Architecture) -> float:
    """FLOPs that a token adds to the normal equations of ``recipes.pruning.healing``.

    Each layer of the student has four: for the inputs behind both norms, and for both output
    projections.
    """
    whole, width = teacher.hidden_size, student.hidden_size
    heads = student.num_attention_heads * student.kv_channels
    inputs = 2 * width * (width + whole)
    outputs = sum(size * (size + width) for size in (heads, student.ffn_hidden_size))
    return 2.0 * student.num_layers * (inputs + outputs)


def feed_forward_width(arch: Architecture) -> int:
    """Feed-forward channels that a token goes through in a layer."""
    if not arch.num_moe_experts:
        return arch.ffn_hidden_size
    experts = arch.moe_router_topk * arch.moe_ffn_hidden_size
    return experts + arch.moe_shared_expert_intermediate_size


def _computed_scores(seq_length: int) -> float:
    """Fraction of the square of scores that a CPU computes."""
    return (1 + min(1, QUERIES_AT_ONCE / seq_length)) / 2


def _forward_bytes(arch: Architecture, dtype_bytes: int) -> float:
    """Memory traffic of a layer's forward pass, which stores no scores; norms are in float32."""
    queries, keys = _attention_widths(arch)
    norm, rotation = (22 if dtype_bytes == 2 else 20), 12 * dtype_bytes
    return (
        arch.hidden_size * 2 * (norm + 3 * dtype_bytes)
        + queries * (rotation + 6 * dtype_bytes)  # keys and values are repeated for each head
        + keys * (rotation + 2 * dtype_bytes)
        + feed_forward_width(arch) * 5 * dtype_bytes
    )


def _backward_bytes(arch: Architecture, seq_length: int, dtype_bytes: int) -> float:
    """Memory traffic of a layer's backward pass, whose scores are in float32."""
    queries, keys = _attention_widths(arch)
    scores = arch.num_attention_heads * seq_length * _computed_scores(seq_length)
    cast = 6 if dtype_bytes == 2 else 0  # to float32 and back
    norm, rotation = 60 + 4 * dtype_bytes, 14 * dtype_bytes
    return (
        arch.hidden_size * 2 * (norm + 3 * dtype_bytes)
        + queries * (rotation + 6 * dtype_bytes + 16 + cast)
        + keys * (rotation + 4 * dtype_bytes + cast)
        + scores * (12 + 9 * dtype_bytes + cast)
        + feed_forward_width(arch) * 11 * dtype_bytes
    )


def _attention_widths(arch: Architecture) -> tuple[int, int]:
    """Channels of all queries, and of all keys."""
    return arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels


def loss_bytes(vocabulary: int, dtype_bytes: int, terms: int, live_teacher: bool) -> float:
    """Memory traffic of a token's loss on logits and of its gradient.

    A second term adds its gradient to that of the first; both share a log-softmax.
    """
    first = 52 + 4 * dtype_bytes  # the student's log-softmax, sums, exponentials and the gradient
    return vocabulary * (first + (32 if live_teacher else 0) + 20 * (terms - 1))


def scoring_bytes(vocabulary: int) -> float:
    """Memory traffic of a token's logits in an evaluation: log-softmax, sums and top-1 token."""
    return 60.0 * vocabulary


def update_bytes(micro_batches: int, dtype_bytes: int) -> float:
    """Memory traffic of a step for a parameter: gradient sums, their norm, Adam, the new weight.

    The first micro batch's gradient is used as it is; further ones are added in float32.
    """
    added = (dtype_bytes + 8) * (micro_batches - 1)
    return added + dtype_bytes + (dtype_bytes + 24) + (4 + dtype_bytes)


# Memory of a rank


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    teacher: float = 0
    activations: float = 0
    logits: float = 0
    reserved: float = 0

    @property
    def total(self) -> float:
        """All of it, with the allocator's fragmentation."""
        used: float = sum(vars(self).values()) - self.reserved
        return used * FRAGMENTATION + self.reserved


def largest(*peaks: Memory) -> Memory:
    """Returns the one with the highest total."""
    return max(peaks, key=lambda memory: memory.total)


def expert_parameters(arch: Architecture) -> int:
    """Parameters of all experts, which expert parallelism splits."""
    expert = 3 * arch.hidden_size * arch.moe_ffn_hidden_size
    return arch.num_layers * arch.num_moe_experts * expert


def rank_parameters(arch: Architecture, layout: Layout, stage: int) -> tuple[float, float]:
    """Parameters of a rank of a pipeline stage: those that all replicas hold, and its experts.

    Megatron holds tied embeddings on both the first and the last stage.
    """
    table = arch.vocab_size * arch.hidden_size
    experts = expert_parameters(arch)
    layers = arch.parameters() - experts - table * (1 if arch.tied_embeddings else 2)
    first, last = stage == 0, stage == layout.pipeline - 1
    tables = first + last - (first and last and arch.tied_embeddings)
    fraction = pipeline_split(arch.num_layers, layout.pipeline)[stage] / arch.num_layers
    dense = (layers * fraction + table * tables) / layout.tensor
    return dense, experts * fraction / (layout.tensor * layout.expert)


def layer_activation_bytes(arch: Architecture, layout: Layout, tokens: float) -> float:
    """Bytes in bfloat16 that a layer's forward pass keeps for the backward pass.

    These are inputs and outputs of both norms, queries, keys, values and attention's output, both
    halves of the first feed-forward GEMM and their gated product; also queries and keys before
    their norm. Only sequence parallelism splits the norms' tensors. Experts keep their tokens,
    gathered from all parts of a sequence, and a gated product scaled by the router's probability.
    """
    whole = 4 * arch.hidden_size
    heads = 2 * (arch.num_attention_heads + arch.num_query_groups) * arch.kv_channels
    if arch.qk_layernorm:
        heads += (arch.num_attention_heads + arch.num_query_groups) * arch.kv_channels
    routed = arch.moe_router_topk * arch.hidden_size
    feed_forward = 3 * feed_forward_width(arch) + arch.moe_router_topk * arch.moe_ffn_hidden_size
    if layout.recompute_feed_forward:
        routed = feed_forward = 0
    split = layout.tensor if layout.sequence_parallel else 1
    return 2 * tokens * (whole / split + routed + (heads + feed_forward) / layout.tensor)


def peak_activation_bytes(arch: Architecture, job: Workload, stage: int, tokens: float) -> float:
    """Bytes in bfloat16 that a pipeline stage keeps of all micro batches in flight (1F1B).

    The last stage has its peak in the loss, between the norms of the last layer and the head.
    Other stages have it inside a layer, the teacher's or one in a backward pass. For each micro
    batch in flight a stage also keeps the hidden states that it received, of student and teacher,
    and one more pair is on its way.
    """
    layout = job.layout
    layer = layer_activation_bytes(arch, layout, tokens)
    layers = pipeline_split(arch.num_layers, layout.pipeline)[stage]
    in_flight = min(layout.pipeline - stage, job.micro_batches)
    whole = 2 * tokens * arch.hidden_size
    split = layout.tensor if layout.sequence_parallel else 1
    gathered = whole if split > 1 else 0  # the buffer of the sequence's all-gather stays
    current = 2 * whole / split if stage == layout.pipeline - 1 else layer
    received = 0.0
    if layout.pipeline > 1:
        width = arch.hidden_size + (job.teacher.hidden_size if job.teacher else 0)
        received = ((in_flight if stage else 0) + 1) * 2 * tokens * width / split
    if layout.recompute_granularity == "full":
        return in_flight * layers * whole / split + layer + gathered + received
    if layout.recompute_feed_forward:
        kept = layer_activation_bytes(arch, replace(layout, recompute_feed_forward=False), tokens)
        current = max(current, kept - layer)
    return in_flight * layers * layer + current + gathered + received


def training_logits_bytes(job: Workload, on_gpu: bool, tokens: float) -> float:
    """Bytes of logits, replaced in place by their gradient, of a live teacher's, and of the loss.

    Without a trained model there are two copies for a moment: Megatron moves the batch axis.
    """
    arch = job.trained or job.teacher
    assert arch is not None
    values = tokens * arch.vocab_size / job.layout.tensor
    chunk = min(LOSS_CHUNK_BYTES, 4 * values) if on_gpu else 0
    logits = values * job.dtype_bytes
    if job.trained is None:
        return max(2 * logits, logits + ONE_MODEL_BUFFERS * chunk)
    if job.teacher is None:
        return logits + (ONE_MODEL_BUFFERS + job.terms - 1) * chunk
    return 2 * logits + (TWO_MODEL_BUFFERS + job.terms - 1) * chunk


def inference_activation_bytes(arch: Architecture, dtype_bytes: int, tokens: int) -> float:
    """Peak of a forward pass that keeps nothing: one layer's widest tensors and its input."""
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
"""A 16-bit scale and a 4-bit zero point for each group of weights."""
BF16_TABLES = ("fp8", "int4_awq")
"""Formats of ModelOpt that leave embedding and head in bfloat16."""


@dataclass(frozen=True)
class Storage:
    """Types of an engine's weights and KV cache."""

    precision: str
    group_size: int | None = None
    """Weights that share a scale; ``None`` for one scale per channel, which is not counted."""
    kv_bytes: int = 4
    """Bytes of a value in the KV cache."""

    def table_bits(self) -> float:
        """Bits of a weight in embedding and head: at least 8."""
        return 16.0 if self.precision in BF16_TABLES else max(8.0, WEIGHT_BITS[self.precision])


def stored_bytes(arch: Architecture, storage: Storage) -> float:
    """Bytes of all weights."""
    tables = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    layers = arch.parameters() - tables
    scale = SCALE_BITS / storage.group_size if storage.group_size else 0.0
    bits = WEIGHT_BITS[storage.precision] + scale
    return (layers * bits + tables * storage.table_bits()) / 8


def weight_traffic(arch: Architecture, storage: Storage) -> float:
    """Bytes of the weights that a forward pass reads; of an untied embedding only a few rows."""
    unread = 0 if arch.tied_embeddings else arch.vocab_size * arch.hidden_size
    return stored_bytes(arch, storage) - unread * storage.table_bits() / 8


def kv_cache_bytes(arch: Architecture, tokens: int, storage: Storage) -> int:
    """Bytes of the keys and values of ``tokens`` tokens."""
    return (
        2 * tokens * arch.num_layers * arch.num_query_groups * arch.kv_channels * storage.kv_bytes
    )


def prefill_flops(arch: Architecture, batch_size: int, prompt_tokens: int) -> float:
    """FLOPs of a batch of prompts: all tokens pass the layers, the last one also the head."""
    head = head_flops(arch)
    layers = forward_flops(arch, prompt_tokens) - head
    return batch_size * float(prompt_tokens * layers + head)


def decode_flops(arch: Architecture, batch_size: int, context: float) -> float:
    """FLOPs of one new token for each sequence of a batch, after ``context`` tokens."""
    width = arch.num_attention_heads * arch.kv_channels
    return batch_size * (2 * arch.active_weights() + 4 * arch.num_layers * width * context)


def decode_traffic(arch: Architecture, batch_size: int, context: float, storage: Storage) -> float:
    """Bytes that a decoding step reads: all weights once, and the KV cache of each sequence."""
    return weight_traffic(arch, storage) + batch_size * context * kv_cache_bytes(arch, 1, storage)
