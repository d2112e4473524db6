"""What a machine allows a model at best: seconds bounded by its FLOPs and by its bytes.

The roofline model (Williams et al. 2009): work takes at least FLOPs / rate and at least bytes /
bandwidth, whichever is longer. The ratio of two models' bounds is the speed-up that pruning can
bring; what is measured below it was lost elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_convert.architecture import Architecture

WEIGHT_BITS = {
    "fp32": 32.0,
    "bf16": 16.0,
    "fp16": 16.0,
    "int8": 8.0,
    "fp8": 8.0,
    "int4": 4.0,
    "int4_awq": 4.0,
}
"""Bits of a weight in a linear layer; scales come on top."""
SCALE_BITS = 20.0
"""A scale of 16 bits and a zero point of 4 for every group of weights, where they share one."""
WHOLE_TABLES = ("fp8", "int4_awq")
"""Formats of ModelOpt, which leave embedding and head in bfloat16."""


@dataclass(frozen=True)
class Machine:
    """Measured rates: FLOP/s of matrix products, and bytes/s of memory."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: float, size: float) -> float:
        """Shortest time for so many FLOPs and so many bytes of memory traffic."""
        return max(flops / self.flops_per_second, size / self.bytes_per_second)


@dataclass(frozen=True)
class Storage:
    """How an engine keeps weights and the KV cache."""

    precision: str
    group_size: int | None = None
    """Weights that share a scale; ``None`` for a scale a channel, which is too little to count."""
    kv_bytes: int = 4
    """Bytes of one value in the KV cache."""

    def linear_bits(self) -> float:
        """Bits of a weight in the layers, its share of a scale included."""
        scale = SCALE_BITS / self.group_size if self.group_size else 0.0
        return WEIGHT_BITS[self.precision] + scale

    def vocabulary_bits(self) -> float:
        """Bits of a weight in embedding and head, which are never stored below 8 bits."""
        return 16.0 if self.precision in WHOLE_TABLES else max(8.0, WEIGHT_BITS[self.precision])


def stored_bytes(arch: Architecture, storage: Storage) -> float:
    """Bytes of all weights."""
    tables = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    layers = arch.parameters() - tables
    return (layers * storage.linear_bits() + tables * storage.vocabulary_bits()) / 8


def weight_bytes(arch: Architecture, storage: Storage) -> float:
    """Bytes of the weights that one forward pass reads: of an untied embedding only rows."""
    unread = 0 if arch.tied_embeddings else arch.vocab_size * arch.hidden_size
    return stored_bytes(arch, storage) - unread * storage.vocabulary_bits() / 8


def kv_cache_bytes(arch: Architecture, tokens: int, storage: Storage) -> int:
    """Bytes of keys and values of so many tokens."""
    return (
        2 * tokens * arch.num_layers * arch.num_query_groups * arch.kv_channels * storage.kv_bytes
    )


def prefill_flops(arch: Architecture, batch_size: int, prompt_tokens: int) -> float:
    """FLOPs of a batch of prompts: every token through the layers, the last one through the head.

    Attention is causal: a token sees half of the prompt on average, in two products.
    """
    head = 2 * arch.vocab_size * arch.hidden_size
    layers = arch.forward_flops_per_token() - head
    width = arch.num_attention_heads * arch.kv_channels
    attention = 2 * arch.num_layers * width * prompt_tokens
    return batch_size * float(prompt_tokens * (layers + attention) + head)


def decode_flops(arch: Architecture, batch_size: int, context: float) -> float:
    """FLOPs of one further token for each sequence of a batch, after ``context`` tokens."""
    width = arch.num_attention_heads * arch.kv_channels
    return batch_size * (arch.forward_flops_per_token() + 4 * arch.num_layers * width * context)


def decode_bytes(arch: Architecture, batch_size: int, context: float, storage: Storage) -> float:
    """Bytes that one decoding step reads: all weights once, and each sequence's KV cache."""
    return weight_bytes(arch, storage) + batch_size * context * kv_cache_bytes(arch, 1, storage)


@dataclass(frozen=True)
class RequestShape:
    """A batch of requests that are alike."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int

    @property
    def context(self) -> float:
        """Tokens that a decoding step has before it, on average."""
        return self.prompt_tokens + self.new_tokens / 2


def prefill_seconds(
    arch: Architecture, shape: RequestShape, storage: Storage, machine: Machine
) -> float:
    """Lower bound of the time to the first token."""
    flops = prefill_flops(arch, shape.batch_size, shape.prompt_tokens)
    return machine.seconds(flops, weight_bytes(arch, storage))


def decode_seconds(
    arch: Architecture, shape: RequestShape, storage: Storage, machine: Machine
) -> float:
    """Lower bound of one decoding step of the batch."""
    flops = decode_flops(arch, shape.batch_size, shape.context)
    size = decode_bytes(arch, shape.batch_size, shape.context, storage)
    return machine.seconds(flops, size)
