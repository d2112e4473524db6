"""Selects the layers, rows and columns to keep by importance, and prunes weights to them.

ModelOpt prunes in memory, directly after scoring, and stores its scores as a pickle for one
pipeline size. Here the kept indices are stored in a file, which can be inspected and compared with
the teacher's weights. The indices for another shape follow from stored scores, without a forward
pass. Whole query groups can be pruned too.
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
"""For each dimension of a Hugging Face weight, Megatron's name of its size; ``None`` if it is never
pruned. Keys are ends of weight names. In an expert, ``ffn_hidden_size`` means
``moe_ffn_hidden_size``."""
LAYER_INDEX = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
"""Index of a layer, counted from 0, in the name of a weight."""
_LAYER_KEY = re.compile(r"layers\.(\d+)\.")  # in keys of scores and indices, counted from 1
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Importance:
    """Importance scores. Layers are counted from 1."""

    teacher_loss: float
    """LM loss of the unpruned model, in nats."""
    layers: dict[str, dict[int, float]]
    """Scores of layers by method. ``block_influence``: see ``scoring``. ``loss``: by how many nats
    the loss rises without the layer."""
    blocks: dict[int, dict[int, float]] = field(default_factory=dict)
    """``blocks[n][i]`` is the rise of the loss without the ``n`` layers from layer ``i`` on."""
    widths: dict[str, Tensor] = field(default_factory=dict)
    """Scores of channels and heads. Keys, with the tensors' shapes: ``hidden_size`` [hidden],
    ``layers.{i}.ffn_hidden_size`` [ffn] and ``layers.{i}.num_attention_heads`` [heads]. An MoE has
    scores of experts and of their channels instead of [ffn], with the keys of ``KeptIndices``."""

    def layer_scores(self, method: str) -> tuple[str, dict[int, float]]:
        """Returns ``method`` and its scores, or block influence if ``method`` was not measured."""
        available = method if method in self.layers else "block_influence"
        return available, self.layers[available]

    def save(self, folder: Path) -> None:
        """Writes layer scores as JSON, and width scores as tensors."""
        save_file(self.widths, folder / WIDTHS_FILE)
        layer_scores = {name: value for name, value in vars(self).items() if name != "widths"}
        write_json(folder / IMPORTANCE_FILE, layer_scores)

    @classmethod
    def load(cls, folder: Path) -> Importance:
        """Reads the files that ``save`` wrote."""
        content = read_json(folder / IMPORTANCE_FILE)

        def with_int_keys(values: dict[str, Any]) -> dict[int, Any]:
            return {int(key): value for key, value in values.items()}

        return cls(
            teacher_loss=content["teacher_loss"],
            layers={method: with_int_keys(scores) for method, scores in content["layers"].items()},
            blocks={int(n): with_int_keys(scores) for n, scores in content["blocks"].items()},
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
            f"layer_importance={method}: the stored scores do not say which {drop} layers to drop.",
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
    """The teacher's layers, channels, heads, query groups and experts that a student keeps.

    Attributes:
        layers: Layers, counted from 1, in order.
        indices: Indices, counted from 0, int64. Keys are ``hidden_size``, ``layers.{i}.AXIS`` for
            the teacher's layer i, and ``layers.{i}.experts.{e}.moe_ffn_hidden_size`` for expert e
            of this layer. An axis that is not pruned has no key.
    """

    layers: list[int]
    indices: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Writes NumPy arrays: torch tensors would be fake, without values, in a rehearsal."""
        widths = {name: indices.int().numpy() for name, indices in self.indices.items()}
        arrays = {"layers": np.array(self.layers, np.int32), **widths}
        safetensors.numpy.save_file(arrays, folder / KEPT_FILE)

    @classmethod
    def load(cls, folder: Path) -> KeptIndices:
        """Reads the file that ``save`` wrote."""
        arrays = safetensors.numpy.load_file(folder / KEPT_FILE)
        layers: list[int] = arrays.pop("layers").tolist()
        return cls(layers, {name: torch.from_numpy(array).long() for name, array in arrays.items()})


def select_indices(
    scores: Mapping[str, Tensor], teacher: Architecture, student: Architecture, layers: list[int]
) -> KeptIndices:
    """Selects the most important indices on the pruned axes.

    The indices keep the teacher's order. Of indices with equal scores, the first is kept.
    ``scores`` are those of ``Importance.widths``; ``layers`` are the kept layers, counted from 1.
    """
    rankings = sort_indices(scores, teacher).indices
    kept = {}
    for name, ranking in rankings.items():
        layer, axis = _LAYER_KEY.match(name), name.rpartition(".")[2]
        count = getattr(student, axis)
        if (layer and int(layer[1]) not in layers) or count == getattr(teacher, axis):
            continue
        if axis == HEADS:
            # Heads are ranked group by group: keep the first heads of each of the first groups.
            per_group = count // student.num_query_groups
            grouped = ranking.view(teacher.num_query_groups, -1)
            kept[name] = grouped[: student.num_query_groups, :per_group].flatten()
        else:
            kept[name] = ranking[:count]
    in_order = {name: indices.sort().values for name, indices in kept.items()}
    return KeptIndices(sorted(layers), in_order)


def sort_indices(scores: Mapping[str, Tensor], teacher: Architecture) -> KeptIndices:
    """Returns all indices, the most important first, as if all were kept.

    If a weight is sorted in this order, its first rows and columns are the pruned weight.
    Groups are sorted by the scores of their heads together, and heads within their groups.
    """
    layers = list(range(1, teacher.num_layers + 1))
    order = {name: score.argsort(descending=True, stable=True) for name, score in scores.items()}
    for layer in layers:
        name = f"layers.{layer}"
        grouped = scores[f"{name}.{HEADS}"].view(teacher.num_query_groups, -1)
        groups = grouped.square().sum(dim=1).argsort(descending=True, stable=True)
        heads = grouped.argsort(dim=1, descending=True, stable=True)[groups]
        order[f"{name}.{GROUPS}"] = groups
        order[f"{name}.{HEADS}"] = (heads + groups[:, None] * grouped.shape[1]).flatten()
    return KeptIndices(layers, order)


def axes_of(name: str) -> tuple[str | None, ...]:
    """Returns the value of ``AXES`` for a Hugging Face weight.

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
    match = LAYER_INDEX.search(name)
    if not match:
        return name
    layer = int(match.group()) + 1
    if layer not in kept.layers:
        return None
    expert, experts = _EXPERT.search(name), kept.indices.get(f"layers.{layer}.{EXPERTS}")
    if expert and experts is not None:
        kept_experts = experts.tolist()
        if int(expert.group()) not in kept_experts:
            return None
        name = _EXPERT.sub(str(kept_experts.index(int(expert.group()))), name)
    return LAYER_INDEX.sub(str(kept.layers.index(layer)), name)


def prune_weight(name: str, weight: Tensor, kept: KeptIndices, head_size: int) -> Tensor:
    """Returns the kept rows and columns of a teacher's weight with this Hugging Face name."""
    match, expert = LAYER_INDEX.search(name), _EXPERT.search(name)
    layer = f"layers.{int(match.group()) + 1}." if match else ""
    for dim, axis in enumerate(axes_of(name)):
        key = axis if axis == HIDDEN else f"{layer}{axis}"
        if expert and axis == FFN:
            key = f"{layer}experts.{expert.group()}.{EXPERT_FFN}"
        indices = kept.indices.get(key)
        if indices is not None:
            rows = _rows_of_heads(indices, head_size) if axis in (HEADS, GROUPS) else indices
            weight = weight.index_select(dim, rows.to(weight.device))
    return weight


def _rows_of_heads(heads: Tensor, size: int) -> Tensor:
    """Returns the indices of the rows, or columns, that belong to heads of ``size`` channels."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


def leading_submatrix(
    name: str, weight: Tensor, student: Architecture, teacher: Architecture
) -> Tensor:
    """Returns as many of a weight's first rows and columns as the student has.

    ``weight`` is the teacher's, sorted by ``sort_indices``. The result is a view, unless heads are
    pruned within groups.
    """
    size = teacher.kv_channels
    for dim, axis in enumerate(axes_of(name)):
        if axis in (HIDDEN, FFN):
            weight = weight.narrow(dim, 0, getattr(student, axis))
        elif axis == GROUPS:
            weight = weight.narrow(dim, 0, student.num_query_groups * size)
        elif axis == HEADS:
            weight = _first_heads(weight, dim, student, teacher)
    return weight


def _first_heads(weight: Tensor, dim: int, student: Architecture, teacher: Architecture) -> Tensor:
    """Returns the first heads of each of the first groups."""
    teacher_rows, student_rows = (
        arch.num_attention_heads // arch.num_query_groups * teacher.kv_channels
        for arch in (teacher, student)
    )  # rows of a group
    if student_rows == teacher_rows:
        return weight.narrow(dim, 0, student.num_query_groups * student_rows)
    grouped = weight.unflatten(dim, (teacher.num_query_groups, teacher_rows))
    grouped = grouped.narrow(dim, 0, student.num_query_groups)
    return grouped.narrow(dim + 1, 0, student_rows).flatten(dim, dim + 1)
