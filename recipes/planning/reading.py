"""What a stage takes that runs models forward and trains none: memory of a rank, and time.

- Activations are one layer's, since nothing is kept for a backward pass. Its feed-forward part is
  the widest: both halves of the first product and their gated product, beside the residual stream.
- Logits exist for a few positions at a time (``evaluation.predictions``). Heads are in float32,
  weights beside the model's own, and those of models that are compared stay until all have read
  the text.
- Importance keeps what goes into every layer, and ModelOpt's hooks take the feed-forward part's
  activations in float32, and their absolute values
  (``modelopt/torch/prune/plugins/mcore_minitron.py``). Of experts they take what comes out, beside
  which Megatron holds what went in, as it was chosen and in the order of the experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nemo_convert.architecture import Architecture
from recipes.core.stage import StageConfig
from recipes.planning.buffers import LOGITS_BYTES
from recipes.planning.estimate import Memory, rank_parameters
from recipes.planning.hardware import Hardware
from recipes.planning.work import (
    Work,
    feed_forward_width,
    healing_flops,
    passes_of,
    reading_bytes,
)
from recipes.planning.workload import Layout

COMPARING, MEASURING = 4.0, 2.0
"""Tensors of that size at once, where models are compared and where one's loss is taken."""
PROVING = 128
"""Tokens that a conversion is proven on (``nemo_convert.parity``)."""
CONTINUATIONS = 0.24
"""Share of a question's tokens that are scored, in those of four benchmarks."""
SCORES = 3
"""Logits, their log-probabilities, and what is made of these."""
RANKS = (2, 4, 8)
"""That layers may be split over."""
GATED = 5
"""Halves of a first product at once, where the gated one is made behind that of other windows."""
WITHOUT_A_LAYER = 0.6
"""Of a forward pass, to run what comes after a layer that is left out, and the head."""


@dataclass(frozen=True)
class Reading:
    """What one stage takes."""

    memory: Memory
    """Of its fullest rank."""
    work: Work
    """On one device: several ranks hold parts of a model, and work in turn."""
    bf16: bool
    """What it is in; else in float32."""


@dataclass(frozen=True)
class Text:
    """What is read."""

    windows: float
    seq_length: int
    micro_batch_size: int
    scored: float = 1.0
    """Share of the tokens that logits are made of."""

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a forward pass."""
        return int(min(self.micro_batch_size, self.windows)) * self.seq_length

    def work(self, arch: Architecture, bf16: bool) -> Work:
        """Of one model's forward passes over all of it."""
        token = passes_of(arch, self.seq_length, 2 if bf16 else 4, 1)
        unread = (self.scored - 1) * 2 * arch.vocab_size * arch.hidden_size
        token += Work(products=unread, bytes=self.scored * reading_bytes(arch.vocab_size))
        token += Work(starts=arch.num_layers / max(1, self.tokens_at_once))
        return token * (self.windows * self.seq_length)


class Estimates(Protocol):
    """Estimates a stage with other settings than its own."""

    def __call__(self, config: Any) -> Reading:
        """What it takes with them."""


def _forward_bytes(arch: Architecture, size: int, tokens: int) -> float:
    """Peak of one layer's forward pass, in numbers of ``size`` bytes."""
    return size * tokens * 3 * (feed_forward_width(arch) + arch.hidden_size)


def _logits_bytes(arch: Architecture, tokens: int, buffers: float) -> float:
    return buffers * min(LOGITS_BYTES, 4 * tokens * arch.vocab_size)


def _head_bytes(arch: Architecture, bf16: bool) -> float:
    """A copy in float32 of a head that the model has in bfloat16 (``predictions.float32_head``)."""
    return 4.0 * arch.vocab_size * arch.hidden_size if bf16 else 0.0


def fullest(*peaks: Memory) -> Memory:
    """The one that takes most."""
    return max(peaks, key=lambda memory: memory.total)


def compared(models: Sequence[Architecture], bf16: bool, text: Text, hardware: Hardware) -> Reading:
    """Models that read a text one after the other, the first of which all are compared with."""
    size, tokens = 2 if bf16 else 4, int(text.windows * text.seq_length)
    peaks = []
    heads = said = 0.0  # of the models before; what all said, which a GPU does not hold
    for arch in models:
        said += 0 if hardware.on_gpu else size * tokens * arch.hidden_size
        peaks.append(
            Memory(
                weights=size * arch.parameters() + heads + _head_bytes(arch, bf16),
                activations=_forward_bytes(arch, size, text.tokens_at_once) + said,
                reserved=hardware.reserved_bytes,
            )
        )
        heads += 4 * arch.vocab_size * arch.hidden_size
    logits = _logits_bytes(models[0], tokens, COMPARING)
    left = Memory(weights=heads, activations=said, logits=logits, reserved=hardware.reserved_bytes)
    work = sum((text.work(arch, bf16) for arch in models), Work())
    return Reading(fullest(*peaks, left), work, bf16)


def ranked(teacher: Architecture, bf16: bool, text: Text, hardware: Hardware) -> Reading:
    """Shapes that are views of one model's weights, compared with all of it."""
    size, tokens = 2 if bf16 else 4, int(text.windows * text.seq_length)
    said = 0 if hardware.on_gpu else 2 * size * tokens * teacher.hidden_size
    held = Memory(
        weights=size * teacher.parameters() + 2 * _head_bytes(teacher, bf16),
        activations=said,
        reserved=hardware.reserved_bytes,
    )
    memory = fullest(
        replace(held, activations=said + _forward_bytes(teacher, size, text.tokens_at_once)),
        replace(held, logits=_logits_bytes(teacher, tokens, COMPARING)),
    )
    return Reading(memory, text.work(teacher, bf16), bf16)


def healed(teacher: Architecture, student: Architecture, text: Text, hardware: Hardware) -> Reading:
    """A shape that is healed: a layer of both models in float32, and what both make of the text.

    The embeddings are shared out to the layers. What both make of it are their residual streams and
    what is read of them; what the student's last product is fed with, of all of the text, and the
    teacher's, as it is made. A CPU has both models there, too, as they are stored.
    """
    both, tokens = (teacher, student), int(text.windows * text.seq_length)
    held = sum(2 * arch.hidden_size for arch in both) + feed_forward_width(student)
    made = GATED * feed_forward_width(teacher)
    layers = sum(arch.parameters() / arch.num_layers for arch in both)
    stored = 0 if hardware.on_gpu else 2 * sum(arch.parameters() for arch in both)
    memory = Memory(
        weights=4 * layers + stored,
        activations=4 * (tokens * held + text.tokens_at_once * made),
        reserved=hardware.reserved_bytes,
    )
    read = replace(text, scored=0)
    fits = Work(products=healing_flops(teacher, student)) * tokens
    return Reading(memory, sum((read.work(arch, False) for arch in both), fits), False)


def scored(
    arch: Architecture,
    bf16: bool,
    text: Text,
    hardware: Hardware,
    pipeline: int = 1,
    left_out: float = 0,
) -> Reading:
    """A model, split over ``pipeline`` ranks, whose channels, heads and layers are scored.

    ``left_out`` are windows that are read again without a layer or a block, over all of them.
    """
    size, tokens = 2 if bf16 else 4, text.tokens_at_once
    layout = Layout(devices=pipeline, pipeline=pipeline)
    dense, experts = max(
        (rank_parameters(arch, layout, stage) for stage in range(pipeline)), key=sum
    )
    states = (-(-arch.num_layers // pipeline) + 1) * size * tokens * arch.hidden_size
    hooked = tokens * 2 * size * arch.hidden_size
    if arch.num_moe_experts:
        hooked += tokens * arch.moe_router_topk * (3 * size + 4) * arch.hidden_size
    else:
        hooked += tokens * (size + 8) * arch.ffn_hidden_size
    held = Memory(
        weights=size * (dense + experts) + _head_bytes(arch, bf16),
        activations=states,
        reserved=hardware.reserved_bytes,
    )
    memory = fullest(
        replace(held, activations=states + max(_forward_bytes(arch, size, tokens), hooked)),
        replace(held, logits=_logits_bytes(arch, tokens, MEASURING)),
    )
    again = replace(text, windows=WITHOUT_A_LAYER * left_out)
    return Reading(memory, text.work(arch, bf16) + again.work(arch, bf16), bf16)


def asked(
    models: Sequence[Architecture], bf16: bool, tokens: int, at_once: int, hardware: Hardware
) -> Reading:
    """Models that answer questions of so many tokens one after the other.

    Any of the tokens of a forward pass, ``at_once``, may be scored.
    """
    largest = max(models, key=lambda arch: arch.parameters())
    size = 2 if bf16 else 4
    memory = Memory(
        weights=size * largest.parameters() + _head_bytes(largest, bf16),
        activations=_forward_bytes(largest, size, at_once),
        logits=SCORES * 4 * at_once * largest.vocab_size,
        reserved=hardware.reserved_bytes,
    )
    text = Text(tokens / at_once, at_once, 1, CONTINUATIONS)
    return Reading(memory, sum((text.work(arch, bf16) for arch in models), Work()), bf16)


def converted(arch: Architecture, hardware: Hardware) -> Reading:
    """A model whose conversion is proven, in float32."""
    memory = Memory(
        weights=4 * arch.parameters(),
        logits=4 * PROVING * arch.vocab_size,
        reserved=hardware.reserved_bytes,
    )
    return Reading(memory, Work(), False)


def smaller(config: StageConfig) -> Iterator[dict[str, Any]]:
    """Settings of a stage that take less memory, those that change least first."""
    one: dict[str, Any] = {"micro_batch_size": 1}
    half = {"precision": "bf16-mixed"}
    split = [{"pipeline_model_parallel_size": ranks} for ranks in RANKS]
    for change in (one, half, {**half, **one}, *split, *({**s, **one} for s in split)):
        if all(hasattr(config, name) for name in change):
            yield change
