"""Results of scoring, pruning and healing. Layers are counted from 1. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreResult:
    """Importance of a teacher's layers."""

    calibration: str
    """Setting ``calibration`` of ``score``: ``text`` or ``random``."""
    calibration_sequences: int
    calibration_tokens: int
    teacher_loss: float
    """LM loss of the teacher without pruning, in nats."""
    layer_importance: dict[str, dict[int, float]]
    """Scores: {method: {layer: score}}; ``kept.Importance.layers`` describes the methods."""
    loss_predictions: int
    """Number of next-token predictions over which each loss is averaged."""


@dataclass(frozen=True)
class PruneResult:
    """Layers that pruning kept, and scores of the layers of the teacher, the model before pruning.

    If the teacher itself was pruned, layers still have the numbers of the original, unpruned model.
    """

    kept_layers: list[int]
    layer_importance: dict[int, float]
    """Score of each layer of the teacher, by the method ``layer_measure``."""
    layer_measure: str
    """The setting ``layer_importance`` of ``prune``, or ``block_influence`` if that method has no
    score for each layer."""
    calibration_tokens: int
    calibration_sequences: int
    teacher_parameters: int | None
    """Number of the teacher's parameters; ``None`` if unknown."""

    def dropped_layers(self) -> list[int]:
        """Returns the teacher's layers that were dropped."""
        return sorted(self.layer_importance.keys() - set(self.kept_layers))


@dataclass(frozen=True)
class HealResult:
    """KL to the teacher before and after healing, without training."""

    kept_layers: list[int] | None
    """Layers that pruning kept, numbered as before all pruning; ``None`` if unknown."""
    calibration_tokens: int
    kl_pruned: float
    """KL of the pruned model to the teacher on validation text, in nats."""
    kl_healed: float
    """KL of the healed model to the teacher on the same text, in nats."""

    @property
    def remaining_kl(self) -> float:
        """KL after healing, as a fraction of the KL before; 1 if the KL before is 0."""
        return self.kl_healed / self.kl_pruned if self.kl_pruned else 1.0
