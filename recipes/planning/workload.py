"""A training, or a teacher's pass over a text, and the layout that it runs on. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_convert.architecture import Architecture


@dataclass(frozen=True)
class Layout:
    """Ranks of a training, and the shard of the model and batch on each of them."""

    nodes: int = 1
    devices: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    optimizer_instances: int = 1
    micro_batch_size: int = 1
    sequence_parallel: bool = False
    recompute_granularity: str = "none"
    """``none``, ``selective`` or ``full``."""
    recompute_feed_forward: bool = False
    """Whether ``selective`` recomputes the feed-forward layers."""

    @property
    def ranks(self) -> int:
        """All processes."""
        return self.nodes * self.devices

    @property
    def model(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Replicas of the model; 0 if the ranks are not divisible."""
        return self.ranks // self.model if self.ranks % self.model == 0 else 0

    @property
    def shards(self) -> int:
        """Ranks that share a copy of the optimizer's state."""
        return self.data * self.context // self.optimizer_instances


def split_axes(arch: Architecture) -> tuple[str, str, str]:
    """Axes of a layer that tensor parallelism splits; the feed-forward axis is last."""
    feed_forward = "moe_ffn_hidden_size" if arch.num_moe_experts else "ffn_hidden_size"
    return "num_attention_heads", "num_query_groups", feed_forward


CHECKPOINT_BYTES = 14
"""Bytes of a parameter in a training checkpoint: bfloat16, main weights, Adam's two moments."""


@dataclass(frozen=True)
class Workload:
    """A training, or a teacher's pass over a text."""

    trained: Architecture | None
    """The model that is trained; ``None`` for a teacher's pass."""
    teacher: Architecture | None
    """The live teacher; ``None`` for a cached one, or without one."""
    layout: Layout
    seq_length: int
    global_batch_size: int
    steps: int
    bf16: bool = True
    gradient_bytes: int = 4
    validation_batches: int = 0
    """Global batches of a validation."""
    terms: int = 1
    """Terms of the loss on logits; each has a gradient of the vocabulary's width."""
    compares_hidden_states: bool = False
    """Whether the loss also compares layers' outputs."""
    cached_sequences: int | None = None
    """Sequences that a cached teacher has; ``None`` for all of the text."""

    @property
    def tokens(self) -> int:
        """Tokens that pass through the models."""
        return self.steps * self.global_batch_size * self.seq_length

    @property
    def micro_batches(self) -> int:
        """Micro batches of a step on each replica."""
        return self.global_batch_size // (self.layout.data * self.layout.micro_batch_size)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a value."""
        return 2 if self.bf16 else 4
