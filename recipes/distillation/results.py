"""Results of training and of caching a teacher. Losses are in nats. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.data.results import TrainedSource


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training stage. Terms that the loss does not have are ``None``."""

    final_loss: float
    final_kd: float | None
    final_hidden: float | None
    final_lm: float | None
    val_loss: float | None
    """Loss of the last validation, which may be some steps before the last step."""
    steps: int
    skipped_steps: int
    tokens: int
    tokens_per_second: float
    sources: list[TrainedSource] = field(default_factory=list, kw_only=True)
    """Tokens and epochs of each source of text."""
    kept_layers: list[int] | None = field(default=None, kw_only=True)
    """``KeptLayers`` of the trained model, which a second round of pruning reads."""


@dataclass(frozen=True)
class KeptLayers:
    """The field that results of pruning and of training have in common."""

    kept_layers: list[int] | None = None
    """For each layer of the model, its number in the model before all pruning, counted from 1;
    ``None`` if the model was not pruned, or if unknown."""


@dataclass(frozen=True)
class DistillationResult(TrainingResult):
    """Result of ``distill``."""

    teacher_loss: float | None
    stopped: str = ""
    """Reason and step of an early stop; empty if there was none."""


@dataclass(frozen=True)
class CacheResult:
    """Result of ``cache_logits``."""

    sequences: int
    sequences_of_text: int
    """Number of sequences of the whole text, cached or not."""

    tokens: int
    bytes_per_token: int
    teacher_loss: float
    tail_mass: float
    """Mean probability of all tokens that are not stored."""
