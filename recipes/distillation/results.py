"""Results of trainings and of cached teachers. Losses in nats. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.data.results import TrainedSource


@dataclass(frozen=True)
class TrainingResult:
    """A training; terms that its loss does not have are ``None``."""

    final_loss: float
    final_kd: float | None
    final_hidden: float | None
    final_lm: float | None
    val_loss: float | None
    steps: int
    skipped_steps: int
    tokens: int
    tokens_per_second: float
    sources: list[TrainedSource] = field(default_factory=list, kw_only=True)
    """Tokens and epochs of each source of text."""


@dataclass(frozen=True)
class KeptLayers:
    """The teacher's layers that a pruned model has, counted from 1."""

    kept_layers: list[int] | None = None


@dataclass(frozen=True)
class DistillationResult(TrainingResult):
    """A training with a teacher."""

    teacher_loss: float | None
    stopped: str = ""
    """Reason and step of an early stop."""
    kept_layers: list[int] | None = None
    """The student's, for a further pruning."""


@dataclass(frozen=True)
class CacheResult:
    """A cached teacher."""

    sequences: int
    sequences_of_text: int
    """Number of all sequences of the text."""
    tokens: int
    bytes_per_token: int
    teacher_loss: float
    tail_mass: float
    """Mean probability of all tokens that are not stored."""
