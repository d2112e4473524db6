"""What goes on between a step's products of matrices, in bytes: most of a CPU's time beside them.

Counted are bytes that each operation reads and writes for a token, in the order in which they
stand in ``nemo_convert.cpu_layers`` (norms in float32; scores, in the backward pass alone, of
blocks of queries in float32), in Megatron's layers (rotations, sums) and in
``recipes.distillation.losses``; what is compiled moves less than that. A GPU's kernels do many of
them at once, and hide most of the rest beside products, so that there all of it is a part of the
utilisation.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_convert.architecture import Architecture
from recipes.backend.device import QUERIES_AT_ONCE

ATTENTION_RATE = 0.6
"""Of a linear layer's FLOP/s in float32, in the small products of attention in blocks."""
PASS_SECONDS = 4.5e-3
"""Of a layer's pass, twice for its way back, in which its operations are started one by one: what a
CPU's threads do not share."""
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 4, 10
"""FLOPs of attention for a channel and a key: two products, and five with one made again."""
BACKWARD = 2
"""FLOPs of a backward pass, in forward passes."""


@dataclass(frozen=True)
class Work:
    """What a device does for a token, or for many."""

    products: float = 0
    """FLOPs of linear layers."""
    attention: float = 0
    """FLOPs of attention, which is causal: half of the square of scores, made once."""
    square: float = 0
    """The same as a CPU computes it, in blocks that go beyond the diagonal."""
    bytes: float = 0
    """Read and written between products."""
    starts: float = 0
    """Passes of layers, a backward pass twice, of many tokens at once."""

    @property
    def flops(self) -> float:
        """FLOPs of all products, as they are usually counted."""
        return self.products + self.attention

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(*(mine + vars(other)[name] for name, mine in vars(self).items()))

    def __mul__(self, number: float) -> Work:
        """So many of it."""
        return Work(*(number * part for part in vars(self).values()))


def passes_of(arch: Architecture, seq_length: int, size: int, passes: int) -> Work:
    """A token's passes through a model.

    Args:
        arch: The model.
        seq_length: Tokens of a window.
        size: Bytes of a number: 2 or 4.
        passes: In forward passes: 1, 3 with a backward pass, 4 if the first is made again for it.
    """
    backward = passes > 1
    forwards = passes - BACKWARD if backward else passes
    products = FORWARD_PRODUCTS * forwards + BACKWARD_PRODUCTS * backward
    area = seq_length * arch.num_attention_heads * arch.kv_channels * arch.num_layers
    written = forwards * _forward_bytes(arch, seq_length, size)
    if backward:
        written += _backward_bytes(arch, seq_length, size)
    return Work(
        products=passes * arch.forward_flops_per_token(),
        attention=passes * 2 * area,
        square=products * area * _square(seq_length),
        bytes=arch.num_layers * written,
    )


def feed_forward_again(arch: Architecture, size: int) -> Work:
    """A token's pass through the feed-forward parts alone, made again for the way back."""
    width = arch.num_layers * feed_forward_width(arch)
    return Work(products=6 * arch.hidden_size * width, bytes=5 * size * width)


def healing_flops(teacher: Architecture, student: Architecture) -> float:
    """Of a token's part in the normal equations of all layers that are left.

    What is read is fitted behind both norms, and both weights that write; see
    ``recipes.pruning.healing``.
    """
    whole, left = teacher.hidden_size, student.hidden_size
    heads = student.num_attention_heads * student.kv_channels
    reads = 2 * left * (left + whole)
    writes = sum(size * (size + left) for size in (heads, student.ffn_hidden_size))
    return 2.0 * student.num_layers * (reads + writes)


def _square(seq_length: int) -> float:
    """Share of the square of scores that is computed."""
    return (1 + min(1, QUERIES_AT_ONCE / seq_length)) / 2


def feed_forward_width(arch: Architecture) -> int:
    """Channels that a token goes through in a layer's feed-forward part: those of its experts."""
    if not arch.num_moe_experts:
        return arch.ffn_hidden_size
    experts = arch.moe_router_topk * arch.moe_ffn_hidden_size
    return experts + arch.moe_shared_expert_intermediate_size


def _widths(arch: Architecture, seq_length: int) -> tuple[int, int, float, int]:
    """Numbers of a token: of all heads' queries, of keys, of scores, and in the feed-forward."""
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    size, scores = arch.kv_channels, heads * seq_length * _square(seq_length)
    return heads * size, groups * size, scores, feed_forward_width(arch)


def _forward_bytes(arch: Architecture, seq_length: int, size: int) -> float:
    """Of a layer, whose attention holds no scores."""
    heads, groups, _, feed_forward = _widths(arch, seq_length)
    norm, rotation = (22 if size == 2 else 20), 12 * size
    return (
        arch.hidden_size * 2 * (norm + 3 * size)
        + heads * (rotation + 6 * size)  # of which keys and values for each head
        + groups * (rotation + 2 * size)
        + feed_forward * 5 * size
    )


def _backward_bytes(arch: Architecture, seq_length: int, size: int) -> float:
    """Of a layer. A cast, to float32 and back, reads and writes 6 bytes; float32 needs none."""
    heads, groups, scores, feed_forward = _widths(arch, seq_length)
    cast = 6 if size == 2 else 0
    norm, rotation = 60 + 4 * size, 14 * size
    return (
        arch.hidden_size * 2 * (norm + 3 * size)
        + heads * (rotation + 6 * size + 16 + cast)
        + groups * (rotation + 4 * size + cast)
        + scores * (12 + 9 * size + cast)
        + feed_forward * 11 * size
    )


def loss_bytes(vocabulary: int, size: int, terms: int, live: bool) -> float:
    """Bytes of a token's loss on logits and its gradient; of a live teacher's, its logits too.

    A second term adds its own slope to the first's, of the same log-softmax.
    """
    first = 52 + 4 * size  # a log-softmax of the student, sums, exponentials, and the gradient
    return vocabulary * (first + (32 if live else 0) + 20 * (terms - 1))


def reading_bytes(vocabulary: int) -> float:
    """Bytes of a token's logits where models are only read: log-softmax, sums, likeliest token."""
    return 60.0 * vocabulary


def update_bytes(micro_batches: int, size: int) -> float:
    """Bytes of a step for a parameter: gradients added up, their norm, Adam, and the new weight.

    The first gradient is taken as it is, which reads none; those that follow are added in float32.
    """
    added = (size + 8) * (micro_batches - 1)
    return added + size + (size + 24) + (4 + size)
