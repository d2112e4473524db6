"""Describes a training run, or the caching of a teacher's logits, without importing torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemo_convert.architecture import Architecture


@dataclass(frozen=True)
class Layout:
    """Devices of a training run, and the parallel sizes that split model and batch over them.

    ``tensor``, ``pipeline``, ``context`` and ``expert`` are sizes: the number of ranks in a group.
    """

    nodes: int = 1
    devices: int = 1
    """Devices of each node. Each device has one rank."""
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    optimizer_instances: int = 1
    """Copies of the optimizer's state; each copy is split over ``optimizer_shards`` ranks."""
    micro_batch_size: int = 1
    sequence_parallel: bool = False
    recompute_granularity: str = "none"
    """``none``, ``selective`` or ``full``."""
    recompute_feed_forward: bool = False
    """Whether ``selective`` also recomputes the feed-forward layers."""

    @property
    def ranks(self) -> int:
        """Number of processes on all nodes."""
        return self.nodes * self.devices

    @property
    def sequence_shards(self) -> int:
        """Number of ranks over which sequence parallelism splits a sequence; 1 without it."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def replica_ranks(self) -> int:
        """Ranks of one replica of the model. They work on the same sequences."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Data-parallel size; 0 if the ranks cannot be split equally."""
        return self.ranks // self.replica_ranks if self.ranks % self.replica_ranks == 0 else 0

    @property
    def optimizer_shards(self) -> int:
        """Number of ranks over which a copy of the optimizer's state is split."""
        return self.data * self.context // self.optimizer_instances


def split_axes(arch: Architecture) -> tuple[str, str, str]:
    """Returns the ``Architecture`` fields that tensor parallelism splits; the last is the FFN's."""
    feed_forward = "moe_ffn_hidden_size" if arch.num_moe_experts else "ffn_hidden_size"
    return "num_attention_heads", "num_query_groups", feed_forward


LOSS_BUFFERS = {"forward_kl": 3, "reverse_kl": 4, "jsd": 6}
"""Number of float32 tensors, as large as a chunk of the logits, that a loss with a live teacher
holds at once, by divergence."""
TOP_K_LOSS_BUFFERS = 3
"""Number of such tensors if a divergence covers only the teacher's largest probabilities."""
ONE_MODEL_LOSS_BUFFERS = 2
"""Number of such tensors in a loss without a live teacher."""
CHECKPOINT_BYTES = 14
"""Bytes per parameter of a training checkpoint: a bfloat16 weight, a float32 main weight, and
Adam's two float32 moments."""


@dataclass(frozen=True)
class Workload:
    """A training run, or a teacher's forward pass over a text to cache its logits."""

    trained: Architecture | None
    """Shape of the model that is trained; ``None`` for a teacher's pass."""
    teacher: Architecture | None
    """Shape of the live teacher; ``None`` if the teacher's logits are cached or there is none."""
    layout: Layout
    seq_length: int
    global_batch_size: int
    steps: int
    bf16: bool = True
    """Whether weights and activations are in bfloat16; otherwise in float32."""
    gradient_bytes: int = 4
    """Bytes per parameter of the gradients of a bfloat16 run."""
    weight_copy_bytes: int = 0
    """Bytes per parameter of TransformerEngine's FP8 copies of the layers' weights."""
    loss_buffers: int = LOSS_BUFFERS["forward_kl"]
    """Number of chunk-sized tensors that the loss holds at once if there is a live teacher."""
    validation_batches: int = 0
    """Number of global batches in one validation."""
    validations: int = 0
    """Number of validations in the whole run."""
    teacher_in_validation: bool = False
    """Whether the teacher also runs in validations."""
    checkpoints: int = 0
    """Number of checkpoints that the run saves."""
    terms: int = 1
    """Number of terms of the loss on logits, such as KD and LM loss. Each has its own gradient."""
    hidden_state_bytes: int = 0
    """Bytes that a loss on hidden states keeps for the backward pass, per token and channel of the
    teacher; 0 without such a loss."""
    teacher_is_cached: bool = False
    """Whether the loss reads the teacher's logits from a cache."""
    cached_sequences: int | None = None
    """Sequences in the cache of a teacher's logits; ``None`` if the cache covers all text."""

    @property
    def tokens(self) -> int:
        """Tokens of all training steps, without validations."""
        return self.steps * self.global_batch_size * self.seq_length

    @property
    def micro_batches(self) -> int:
        """Micro batches of a step on each replica."""
        return self.global_batch_size // (self.layout.data * self.layout.micro_batch_size)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4


def workloads_of_shapes(workload: Workload, shapes: Sequence[Architecture]) -> list[Workload]:
    """Returns one workload for each of ``shapes``, in which the trained model has that shape.

    If there are no shapes or the workload trains no model, returns only the unchanged workload.
    """
    if workload.trained is None or not shapes:
        return [workload]
    return [replace(workload, trained=shape) for shape in shapes]
