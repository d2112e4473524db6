"""Results of training and of caching a teacher. Losses are in nats. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.data.results import TrainedSource


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training stage.

    The ``final_…`` fields are means over the global batch of the last step with a finite loss.
    They are ``None`` for terms that the loss does not have.
    """

    final_loss: float
    """Weighted sum of the terms."""
    final_kd: float | None
    final_hidden: float | None
    final_lm: float | None
    val_loss: float | None
    """LM loss of the last validation, which can be before the last step; ``None`` if there was no
    validation."""
    steps: int
    skipped_steps: int
    """Steps without an update of the weights, because the gradient was not finite."""
    tokens: int
    """Tokens of all steps, including masked tokens."""
    tokens_per_second: float
    """Median over the steps."""
    sources: list[TrainedSource] = field(default_factory=list, kw_only=True)
    """Tokens and epochs of each source of text."""
    kept_layers: list[int] | None = field(default=None, kw_only=True)
    """For each layer of the trained model, its number in the model before all pruning, counted
    from 1; ``None`` if the model was not pruned, or if unknown."""


@dataclass(frozen=True)
class KeptLayers:
    """The field that the results of pruning and of training have in common."""

    kept_layers: list[int] | None = None
    """For each layer, its number in the model before all pruning; ``None`` if unknown."""


@dataclass(frozen=True)
class DistillationResult(TrainingResult):
    """Result of ``distill``."""

    teacher_loss: float | None
    """LM loss of a live teacher on the first micro batch; ``None`` without a live teacher."""
    stopped: str = ""
    """Reason and step of an early stop; empty if training did not stop early."""


@dataclass(frozen=True)
class CacheResult:
    """Result of ``cache_logits``."""

    sequences: int
    """Number of cached sequences."""
    sequences_of_text: int
    """Number of sequences of the whole text, cached or not."""
    tokens: int
    """Number of cached positions."""
    bytes_per_token: int
    teacher_loss: float
    """Mean LM loss of the teacher on the cached sequences."""
    tail_mass: float
    """Mean, over positions, of the total probability of all tokens outside the top-k."""
