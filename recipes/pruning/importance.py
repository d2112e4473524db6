"""Importance of a model's channels, heads and layers, and its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.core.files import read_json, write_json

FILE, WIDTHS = "importance.json", "importance.safetensors"


@dataclass(frozen=True)
class Importance:
    """Importance scores. Layers are counted from 1."""

    teacher_loss: float
    """LM loss of the whole model, in nats."""
    layers: dict[str, dict[int, float]]
    """Scores by method: ``block_influence``, and ``loss`` (its change without the layer, in
    nats)."""
    blocks: dict[int, dict[int, float]] = field(default_factory=dict)
    """Change of the loss without a block of adjacent layers, by its size and first layer."""
    greedy: list[int] = field(default_factory=list)
    """Layers in the order in which the greedy method removes them."""
    widths: dict[str, Tensor] = field(default_factory=dict)
    """Scores of ``hidden_size`` [hidden] and, as ``layers.{i}.AXIS``, of ``ffn_hidden_size`` [ffn]
    and ``num_attention_heads`` [heads]."""

    def of_layers(self, method: str) -> tuple[str, dict[int, float]]:
        """Returns a method and its scores; block influence if ``method`` has no layer scores."""
        measure = method if method in self.layers else "block_influence"
        return measure, self.layers[measure]

    def save(self, folder: Path) -> None:
        """Writes layer scores as JSON, and width scores as tensors."""
        save_file(self.widths, folder / WIDTHS)
        plain = {name: value for name, value in vars(self).items() if name != "widths"}
        write_json(folder / FILE, plain)

    @classmethod
    def load(cls, folder: Path) -> Importance:
        """Reads the files that ``save`` wrote."""
        content = read_json(folder / FILE)

        def numbered(values: dict[str, Any]) -> dict[int, Any]:
            return {int(number): value for number, value in values.items()}

        return cls(
            teacher_loss=content["teacher_loss"],
            layers={method: numbered(scores) for method, scores in content["layers"].items()},
            blocks={n: numbered(scores) for n, scores in numbered(content["blocks"]).items()},
            greedy=content["greedy"],
            widths=load_file(folder / WIDTHS),
        )
