"""What scoring and pruning find of layers, which are counted from 1. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreResult:
    """What a teacher's layers are worth."""

    calibration: str
    calibration_sequences: int
    calibration_tokens: int
    teacher_loss: float
    layer_importance: dict[str, dict[int, float]]
    """By measure and layer."""
    loss_predictions: int
    """Of a next token that losses are means of."""


@dataclass(frozen=True)
class PruneResult:
    """What was kept of a teacher; layers have its numbers, also where others went before."""

    kept_layers: list[int]
    layer_importance: dict[int, float]
    layer_measure: str
    calibration_tokens: int
    calibration_sequences: int
    teacher_parameters: int | None

    def dropped_layers(self) -> list[int]:
        """The teacher's layers that went."""
        return sorted(self.layer_importance.keys() - set(self.kept_layers))


@dataclass(frozen=True)
class HealResult:
    """What healing brought back, without training."""

    kept_layers: list[int] | None
    """As of the pruned model."""
    calibration_tokens: int
    kl_pruned: float
    """To the teacher on validation text, in nats, before."""
    kl_healed: float

    @property
    def remaining_kl(self) -> float:
        """Fraction of the pruned model's KL to the teacher that remains after healing."""
        return self.kl_healed / self.kl_pruned if self.kl_pruned else 1.0
