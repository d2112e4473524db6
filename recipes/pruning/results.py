"""Results of scoring, pruning and healing. Layers are counted from 1. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreResult:
    """Importance of a teacher's layers."""

    calibration: str
    calibration_sequences: int
    calibration_tokens: int
    teacher_loss: float
    layer_importance: dict[str, dict[int, float]]
    """Scores by method and layer; see ``Importance.layers``."""
    loss_predictions: int
    """Number of next-token predictions that each loss is a mean of."""


@dataclass(frozen=True)
class PruneResult:
    """Layers that pruning kept, and scores of all layers by the method ``layer_measure``.

    Layers are numbered as in the original, unpruned model.
    """

    kept_layers: list[int]
    layer_importance: dict[int, float]
    layer_measure: str
    calibration_tokens: int
    calibration_sequences: int
    teacher_parameters: int | None

    def dropped_layers(self) -> list[int]:
        """Returns the teacher's layers that were dropped."""
        return sorted(self.layer_importance.keys() - set(self.kept_layers))


@dataclass(frozen=True)
class HealResult:
    """KL to the teacher before and after healing, without training."""

    kept_layers: list[int] | None
    """Layers of the teacher that the pruned model has; ``None`` if unknown."""
    calibration_tokens: int
    kl_pruned: float
    """KL of the pruned model to the teacher on validation text, in nats."""
    kl_healed: float

    @property
    def remaining_kl(self) -> float:
        """Fraction of the pruned model's KL to the teacher that remains after healing."""
        return self.kl_healed / self.kl_pruned if self.kl_pruned else 1.0
