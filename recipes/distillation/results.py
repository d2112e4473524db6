"""What trainings and caches come to. Losses in nats. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingResult:
    """A training; a term of the loss that it has not is ``None``."""

    final_loss: float
    final_kd: float | None
    final_hidden: float | None
    final_lm: float | None
    val_loss: float | None
    steps: int
    skipped_steps: int
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class KeptLayers:
    """Which of the teacher's layers a model has, where it was pruned; counted from 1."""

    kept_layers: list[int] | None = None


@dataclass(frozen=True)
class DistillationResult(TrainingResult):
    """A training that a teacher took part in."""

    teacher_loss: float | None
    stopped: str = ""
    """At which step and why, if before its last."""
    kept_layers: list[int] | None = None
    """The student's, for what prunes it again."""


@dataclass(frozen=True)
class CacheResult:
    """A teacher's cache."""

    sequences: int
    sequences_of_text: int
    """That there are in all."""
    tokens: int
    bytes_per_token: int
    teacher_loss: float
    tail_mass: float
    """Mean probability of all tokens that are not kept."""
