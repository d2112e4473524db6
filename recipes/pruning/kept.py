"""Selects the layers, rows and columns to keep by importance, and prunes weights to them.

ModelOpt prunes in memory, directly after scoring. Its stored scores are a pickle for one pipeline
size. Here the kept indices are a file, which can be inspected and compared with the teacher's
weights. For another shape they are computed without a forward pass. Whole query groups can be
pruned too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json

IMPORTANCE_FILE, WIDTHS_FILE = "importance.json", "importance.safetensors"
KEPT_FILE = "kept.safetensors"
HIDDEN, FFN = "hidden_size", "ffn_hidden_size"
HEADS, GROUPS = "num_attention_heads", "num_query_groups"
EXPERTS, EXPERT_FFN = "num_moe_experts", "moe_ffn_hidden_size"
AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens.weight": (None, HIDDEN),
    "lm_head.weight": (None, HIDDEN),
    "norm.weight": (HIDDEN,),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "q_proj.weight": (HEADS, HIDDEN),
    "k_proj.weight": (GROUPS, HIDDEN),
    "v_proj.weight": (GROUPS, HIDDEN),
    "q_proj.bias": (HEADS,),
    "k_proj.bias": (GROUPS,),
    "v_proj.bias": (GROUPS,),
    "q_norm.weight": (None,),
    "k_norm.weight": (None,),
    "o_proj.weight": (HIDDEN, HEADS),
    "gate.weight": (EXPERTS, HIDDEN),
    "gate_proj.weight": (FFN, HIDDEN),
    "up_proj.weight": (FFN, HIDDEN),
    "down_proj.weight": (HIDDEN, FFN),
}
"""Axis of each dimension of a Hugging Face weight, by the end of the weight's name. In an expert,
``ffn_hidden_size`` means ``moe_ffn_hidden_size``."""
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_LAYER_KEY = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Importance:
    """Importance scores. Layers are counted from 1."""

    teacher_loss: float
    """LM loss of the unpruned model, in nats."""
    layers: dict[str, dict[int, float]]
    """Scores of layers, by method: ``block_influence``, or ``loss``, the change of the loss without
    the layer, in nats."""
    blocks: dict[int, dict[int, float]] = field(default_factory=dict)
    """Change of the loss without a block of adjacent layers, by its size and its first layer."""
    widths: dict[str, Tensor] = field(default_factory=dict)
    """Scores of ``hidden_size`` [hidden] and, as ``layers.{i}.AXIS``, of ``ffn_hidden_size`` [ffn]
    and ``num_attention_heads`` [heads]."""

    def layer_scores(self, method: str) -> tuple[str, dict[int, float]]:
        """Returns a method and its scores; block influence if ``method`` has no layer scores."""
        available = method if method in self.layers else "block_influence"
        return available, self.layers[available]

    def save(self, folder: Path) -> None:
        """Writes layer scores as JSON, and width scores as tensors."""
        save_file(self.widths, folder / WIDTHS_FILE)
        plain = {name: value for name, value in vars(self).items() if name != "widths"}
        write_json(folder / IMPORTANCE_FILE, plain)

    @classmethod
    def load(cls, folder: Path) -> Importance:
        """Reads the files that ``save`` wrote."""
        content = read_json(folder / IMPORTANCE_FILE)

        def numbered(values: dict[str, Any]) -> dict[int, Any]:
            return {int(number): value for number, value in values.items()}

        return cls(
            teacher_loss=content["teacher_loss"],
            layers={method: numbered(scores) for method, scores in content["layers"].items()},
            blocks={n: numbered(scores) for n, scores in numbered(content["blocks"]).items()},
            widths=load_file(folder / WIDTHS_FILE),
        )


def layers_to_keep(importance: Importance, method: str, count: int) -> list[int]:
    """Selects ``count`` layers to keep, counted from 1, by a method of ``layer_importance``.

    Raises:
        RecipeError: The method's scores were not computed.
    """
    layers = sorted(importance.layers["block_influence"])
    drop = len(layers) - count
    if drop == 0:
        return layers
    if method == "block":
        measured, setting = drop in importance.blocks, f"block_sizes=[{drop}]"
    else:
        measured, setting = method in importance.layers, "num_loss_samples=8"
    if not measured:
        raise RecipeError(
            f"layer_importance={method}: {drop} layers cannot be dropped by these scores.",
            f"set stages.score.{setting}",
        )
    if method == "block":
        starts = importance.blocks[drop]
        first = min(starts, key=lambda start: starts[start])
        dropped = set(range(first, first + drop))
    else:
        scores = importance.layers[method]
        dropped = set(sorted(layers, key=lambda layer: scores[layer])[:drop])
    return [layer for layer in layers if layer not in dropped]


@dataclass(frozen=True)
class KeptIndices:
    """The layers and rows that a student keeps of its teacher.

    Attributes:
        layers: Layers, counted from 1, in order.
        rows: Indices, counted from 0, int64. The key is ``hidden_size``, or ``layers.{i}.AXIS`` for
            the teacher's layer i, or ``layers.{i}.experts.{e}.moe_ffn_hidden_size`` for its expert
            e. An axis that is not pruned has no key.
    """

    layers: list[int]
    rows: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Writes everything as NumPy arrays, since a rehearsal has only fake tensors."""
        rows = {name: rows.int().numpy() for name, rows in self.rows.items()}
        arrays = {"layers": np.array(self.layers, np.int32), **rows}
        safetensors.numpy.save_file(arrays, folder / KEPT_FILE)

    @classmethod
    def load(cls, folder: Path) -> KeptIndices:
        """Reads the file that ``save`` wrote."""
        arrays = safetensors.numpy.load_file(folder / KEPT_FILE)
        layers: list[int] = arrays.pop("layers").tolist()
        return cls(layers, {name: torch.from_numpy(rows).long() for name, rows in arrays.items()})


def select_rows(
    scores: Mapping[str, Tensor], teacher: Architecture, student: Architecture, layers: list[int]
) -> KeptIndices:
    """Selects the most important rows by ``Importance.widths``, on the pruned axes.

    Rows keep the teacher's order. Of rows with equal scores, the first is kept. ``layers`` are the
    kept layers, counted from 1.
    """
    ranked = sort_rows(scores, teacher).rows
    rows = {}
    for name, ranking in ranked.items():
        layer, axis = _LAYER_KEY.match(name), name.rpartition(".")[2]
        count = getattr(student, axis)
        if (layer and int(layer[1]) not in layers) or count == getattr(teacher, axis):
            continue
        if axis == HEADS:
            per_group = count // student.num_query_groups
            grouped = ranking.view(teacher.num_query_groups, -1)
            rows[name] = grouped[: student.num_query_groups, :per_group].flatten()
        else:
            rows[name] = ranking[:count]
    return KeptIndices(sorted(layers), {name: row.sort().values for name, row in rows.items()})


def sort_rows(scores: Mapping[str, Tensor], teacher: Architecture) -> KeptIndices:
    """Sorts all rows by importance, so that a pruned weight is the first rows of the sorted one.

    Heads are sorted within their groups, and the groups are sorted.
    """
    layers = list(range(1, teacher.num_layers + 1))
    rows = {name: score.argsort(descending=True, stable=True) for name, score in scores.items()}
    for layer in layers:
        name = f"layers.{layer}"
        grouped = scores[f"{name}.{HEADS}"].view(teacher.num_query_groups, -1)
        groups = grouped.square().sum(dim=1).argsort(descending=True, stable=True)
        heads = grouped.argsort(dim=1, descending=True, stable=True)[groups]
        rows[f"{name}.{GROUPS}"] = groups
        rows[f"{name}.{HEADS}"] = (heads + groups[:, None] * grouped.shape[1]).flatten()
    return KeptIndices(layers, rows)


def axes_of(name: str) -> tuple[str | None, ...]:
    """Returns the axes of a Hugging Face weight's dimensions.

    Raises:
        RecipeError: The name is unknown.
    """
    end = ".".join(name.split(".")[-2:])
    if end not in AXES:
        raise RecipeError(
            f"weight {name} cannot be pruned.", "add its axes to AXES in recipes/pruning/kept.py"
        )
    return AXES[end]


def student_name(name: str, kept: KeptIndices) -> str | None:
    """Returns a weight's name in the student; ``None`` if its layer or expert is pruned."""
    match = _LAYER.search(name)
    if not match:
        return name
    layer = int(match.group()) + 1
    if layer not in kept.layers:
        return None
    expert, experts = _EXPERT.search(name), kept.rows.get(f"layers.{layer}.{EXPERTS}")
    if expert and experts is not None:
        kept_experts = experts.tolist()
        if int(expert.group()) not in kept_experts:
            return None
        name = _EXPERT.sub(str(kept_experts.index(int(expert.group()))), name)
    return _LAYER.sub(str(kept.layers.index(layer)), name)


def prune_weight(name: str, weight: Tensor, kept: KeptIndices, head_size: int) -> Tensor:
    """Returns the kept rows and columns of a teacher's weight with this Hugging Face name."""
    match, expert = _LAYER.search(name), _EXPERT.search(name)
    layer = f"layers.{int(match.group()) + 1}." if match else ""
    for dim, axis in enumerate(axes_of(name)):
        key = axis if axis == HIDDEN else f"{layer}{axis}"
        if expert and axis == FFN:
            key = f"{layer}experts.{expert.group()}.{EXPERT_FFN}"
        rows = kept.rows.get(key)
        if rows is not None:
            rows = _rows_of_heads(rows, head_size) if axis in (HEADS, GROUPS) else rows
            weight = weight.index_select(dim, rows.to(weight.device))
    return weight


def _rows_of_heads(heads: Tensor, size: int) -> Tensor:
    """Returns the rows of whole heads."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


def leading_block(name: str, weight: Tensor, shape: Architecture, teacher: Architecture) -> Tensor:
    """Returns the first rows and columns of a weight of ``teacher``, sorted by ``sort_rows``.

    The result is a view, unless heads are pruned within groups.
    """
    size = teacher.kv_channels
    for dim, axis in enumerate(axes_of(name)):
        if axis in (HIDDEN, FFN):
            weight = weight.narrow(dim, 0, getattr(shape, axis))
        elif axis == GROUPS:
            weight = weight.narrow(dim, 0, shape.num_query_groups * size)
        elif axis == HEADS:
            weight = _first_heads(weight, dim, shape, teacher)
    return weight


def _first_heads(weight: Tensor, dim: int, shape: Architecture, teacher: Architecture) -> Tensor:
    """Returns the first heads of each of the first groups."""
    per_group, kept = (a.num_attention_heads // a.num_query_groups for a in (teacher, shape))
    if kept == per_group:
        return weight.narrow(dim, 0, shape.num_attention_heads * teacher.kv_channels)
    grouped = weight.unflatten(dim, (teacher.num_query_groups, per_group * teacher.kv_channels))
    grouped = grouped.narrow(dim, 0, shape.num_query_groups)
    return grouped.narrow(dim + 1, 0, kept * teacher.kv_channels).flatten(dim, dim + 1)
