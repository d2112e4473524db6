"""One training or pass over text, and the layout that it runs on, as a planner sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemo_convert.architecture import Architecture


@dataclass(frozen=True)
class Layout:
    """Where a training's ranks are and what each of them holds."""

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
    """Of activations in the backward pass: ``none``, ``selective`` or ``full``."""
    recompute_feed_forward: bool = False
    """Whether ``selective`` is of the feed-forward part."""

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.nodes * self.devices

    @property
    def model(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Replicas of the model; 0 if they do not come out even."""
        return self.ranks // self.model if self.ranks % self.model == 0 else 0

    @property
    def shards(self) -> int:
        """Ranks that a copy of the optimizer's state is split over."""
        return self.data * self.context // self.optimizer_instances

    def sizes(self) -> dict[str, int]:
        """Its sizes, by what a training's config calls them."""
        return {name: getattr(self, part) for part, name in LAYOUT_FIELDS.items()}


LAYOUT_FIELDS = {
    "nodes": "resources.nodes",
    "devices": "resources.devices",
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
    "micro_batch_size": "micro_batch_size",
}
"""Sizes of a layout, and what a training's config calls them."""


def split_axes(arch: Architecture) -> tuple[str, str, str]:
    """Sizes of layers that tensor parallelism splits, the feed-forward part's last."""
    feed_forward = "moe_ffn_hidden_size" if arch.num_moe_experts else "ffn_hidden_size"
    return "num_attention_heads", "num_query_groups", feed_forward


CHECKPOINT_BYTES = 14
"""Of a parameter in a checkpoint to resume from: bfloat16, main weights and Adam's two moments."""


@dataclass(frozen=True)
class Workload:
    """One training, or one pass of a teacher over text."""

    name: str
    trained: Architecture | None
    """The model that learns; ``None`` where a teacher only reads."""
    teacher: Architecture | None
    """The model that runs beside it; ``None`` for a cached teacher, or none."""
    layout: Layout
    seq_length: int
    global_batch_size: int
    steps: int
    bf16: bool = True
    gradient_bytes: int = 4
    validation_batches: int = 0
    """Global batches of a validation."""
    terms: int = 1
    """Terms of the loss on logits, each of which keeps a gradient as wide as the vocabulary."""
    compares_hidden_states: bool = False
    """Whether the loss is on layers' outputs too."""
    windows: int | None = None
    """Windows that there are at most, where a cached teacher knows only some of the text."""

    @property
    def tokens(self) -> int:
        """Tokens that are trained on or read."""
        return self.steps * self.global_batch_size * self.seq_length

    @property
    def micro_batches(self) -> int:
        """Micro batches of a step on each replica."""
        return self.global_batch_size // (self.layout.data * self.layout.micro_batch_size)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a stage's config."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Workload:
        """The job that ``as_dict`` made."""
        shapes = {role: plain[role] and Architecture(**plain[role]) for role in ROLES}
        return cls(**{**plain, **shapes, "layout": Layout(**plain["layout"])})


ROLES = ("trained", "teacher")
