"""Selects the layers, rows and columns to keep by importance, and prunes weights to them.

ModelOpt prunes in memory, directly after scoring, and its stored scores fit only one pipeline size.
Here files store scores and kept indices for any pipeline size. So indices for another shape are
selected without a forward pass. Unlike in ModelOpt, whole query groups can be pruned.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
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
from recipes.core.stage import Inputs

IMPORTANCE_FILE, WIDTHS_FILE = "importance.json", "importance.safetensors"
KEPT_FILE = "kept.safetensors"
# Prunable axes, by Megatron's names of their sizes
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
"""Maps the end of a Hugging Face weight's name to the axis of each dimension, or ``None`` for a
dimension that is never pruned. In an expert, ``ffn_hidden_size`` means ``moe_ffn_hidden_size``."""
LAYER_INDEX = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
"""Index of a layer in a weight's name, counted from 0: 3 in ``model.layers.3.mlp.gate.weight``."""
_LAYER_KEY = re.compile(r"layers\.(\d+)\.")
"""Number of a layer, counted from 1, in a key of ``Importance.widths`` or ``KeptIndices.indices``:
4 in ``layers.4.ffn_hidden_size``."""
_EXPERT_INDEX = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
"""Index of an expert in a weight's name, counted from 0: 7 in ``mlp.experts.7.up_proj.weight``."""


@dataclass(frozen=True)
class Importance:
    """Importance scores of a teacher. Layers are counted from 1."""

    teacher_loss: float
    """LM loss of the unpruned model, in nats."""
    layers: dict[str, dict[int, float]]
    """Scores of layers: {method: {layer: score}}. The methods are ``block_influence``, how much
    a layer changes its input, and ``loss``, the rise of the LM loss without the layer, in nats."""
    blocks: dict[int, dict[int, float]] = field(default_factory=dict)
    """``blocks[n][i]`` is the rise of the LM loss, in nats, without ``n`` adjacent layers, of which
    ``i`` is the first."""
    widths: dict[str, Tensor] = field(default_factory=dict)
    """Scores of channels and heads. Keys, with the tensors' shapes: ``hidden_size`` [hidden],
    ``layers.{i}.ffn_hidden_size`` [ffn] and ``layers.{i}.num_attention_heads`` [heads]. Instead of
    [ffn], an MoE has ``layers.{i}.num_moe_experts`` [experts] and, for each expert e,
    ``layers.{i}.experts.{e}.moe_ffn_hidden_size`` [ffn of the expert]."""

    def layer_scores(self, method: str) -> tuple[str, dict[int, float]]:
        """Returns ``method`` and its scores, or block influence if ``method`` was not measured."""
        measured_method = method if method in self.layers else "block_influence"
        return measured_method, self.layers[measured_method]

    def save(self, folder: Path) -> None:
        """Writes layer scores as JSON, and width scores as tensors."""
        save_file(self.widths, folder / WIDTHS_FILE)
        layer_scores = {name: value for name, value in vars(self).items() if name != "widths"}
        write_json(folder / IMPORTANCE_FILE, layer_scores)

    @classmethod
    def load(cls, folder: Path) -> Importance:
        """Reads the files that ``save`` wrote."""
        content = read_json(folder / IMPORTANCE_FILE)  # its keys are strings

        def with_int_keys(values: dict[str, Any]) -> dict[int, Any]:
            return {int(key): value for key, value in values.items()}

        return cls(
            teacher_loss=content["teacher_loss"],
            layers={method: with_int_keys(scores) for method, scores in content["layers"].items()},
            blocks={int(n): with_int_keys(scores) for n, scores in content["blocks"].items()},
            widths=load_file(folder / WIDTHS_FILE),
        )


def importance_of(inputs: Inputs) -> Importance:
    """Reads the scores in the input ``importance`` of the model in the input ``checkpoint``.

    Raises:
        RecipeError: The scores are of another run and of another model.
    """
    scores, model = inputs["importance"], inputs["checkpoint"]
    # The user may keep stale scores (``accept``), so scores of the same run always pass.
    is_same_run = scores.directory.parent == model.directory.parent
    scored_fingerprint = scores.manifest.inputs.get("checkpoint")
    scored_content = scores.manifest.input_content.get("checkpoint")
    is_same_model = (
        scored_fingerprint == model.manifest.fingerprint
        # Equal files have another fingerprint if ``import_hf`` ran with other code.
        or scored_content == model.manifest.content_hash()
    )
    if not (is_same_run or is_same_model):
        raise RecipeError(
            f"the scores in {scores.directory} are of another model than {model.directory}.",
            "set the input importance of this stage to scores of the model in its input checkpoint",
        )
    return Importance.load(scores.artifact)


def layers_to_keep(importance: Importance, method: str, count: int) -> list[int]:
    """Selects ``count`` layers to keep, counted from 1, by a method of ``layer_importance``.

    Raises:
        RecipeError: The method's scores were not computed.
    """
    layers = sorted(importance.layers["block_influence"])
    num_dropped = len(layers) - count
    if num_dropped == 0:
        return layers
    if method == "block":  # each score has the first layer of its block as key
        scores, setting = importance.blocks.get(num_dropped), f"block_sizes=[{num_dropped}]"
    else:
        scores, setting = importance.layers.get(method), "num_loss_samples=8"
    if scores is None:
        raise RecipeError(
            f"layer_importance={method}: the stored scores do not say which {num_dropped} layers "
            "to drop.",
            f"set stages.score.{setting}",
        )
    # The least important layer comes first. Of layers with equal scores, the lower one comes first.
    ranking = sorted(sorted(scores), key=scores.__getitem__)
    dropped: Collection[int]
    if method == "block":
        dropped = range(ranking[0], ranking[0] + num_dropped)
    else:
        dropped = ranking[:num_dropped]
    return [layer for layer in layers if layer not in dropped]


@dataclass(frozen=True)
class KeptIndices:
    """The teacher's layers, channels, heads, query groups and experts that a student keeps.

    Attributes:
        layers: Layers, counted from 1, in order.
        indices: Indices into the teacher's axes, counted from 0, int64. Keys are ``hidden_size``;
            ``layers.{i}.AXIS`` for the teacher's layer i, counted from 1; and
            ``layers.{i}.experts.{e}.moe_ffn_hidden_size`` for its expert e, counted from 0. An axis
            that is not pruned has no key.
    """

    layers: list[int]
    indices: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Writes the indices as NumPy arrays.

        Torch tensors would have no values in a rehearsal, which fakes them.
        """
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
    """Selects the most important indices on the pruned axes, in the teacher's order.

    Of indices with equal scores, the first is kept. Only axes on which the shapes of teacher and
    student differ are pruned. ``scores`` are ``Importance.widths`` of the teacher. ``layers`` are
    the layers to keep, counted from 1.
    """
    rankings = sort_indices(scores, teacher).indices
    selected = {}
    for key, ranking in rankings.items():
        axis = key.rpartition(".")[2]
        count = getattr(student, axis)
        layer_match = _LAYER_KEY.match(key)
        is_dropped_layer = layer_match is not None and int(layer_match[1]) not in layers
        if is_dropped_layer or count == getattr(teacher, axis):
            continue
        if axis == HEADS:
            # Heads are ranked group by group: keep the first heads of each of the first groups.
            per_group = count // student.num_query_groups
            grouped = ranking.view(teacher.num_query_groups, -1)
            selected[key] = grouped[: student.num_query_groups, :per_group].flatten()
        else:
            selected[key] = ranking[:count]
    sorted_indices = {key: indices.sort().values for key, indices in selected.items()}
    return KeptIndices(sorted(layers), sorted_indices)


def sort_indices(scores: Mapping[str, Tensor], teacher: Architecture) -> KeptIndices:
    """Returns all layers and all indices, sorted from the most to the least important index.

    If a weight is sorted in this order, its first rows and columns are the pruned weight. Query
    groups are sorted by the sum of their heads' squared scores. Heads are sorted only within their
    group. ``scores`` are ``Importance.widths`` of the teacher.
    """
    layers = list(range(1, teacher.num_layers + 1))
    order = {key: score.argsort(descending=True, stable=True) for key, score in scores.items()}
    for layer in layers:
        prefix = f"layers.{layer}"
        grouped = scores[f"{prefix}.{HEADS}"].view(teacher.num_query_groups, -1)
        groups = grouped.square().sum(dim=1).argsort(descending=True, stable=True)
        heads = grouped.argsort(dim=1, descending=True, stable=True)[groups]
        order[f"{prefix}.{GROUPS}"] = groups
        # The index of a head in its layer is group · heads per group + index in the group.
        order[f"{prefix}.{HEADS}"] = (heads + groups[:, None] * grouped.shape[1]).flatten()
    return KeptIndices(layers, order)


def axes_of(name: str) -> tuple[str | None, ...]:
    """Returns the value of ``AXES`` for a Hugging Face weight; an unknown name is an error."""
    name_end = ".".join(name.split(".")[-2:])  # such as "q_proj.weight"
    if name_end not in AXES:
        raise RecipeError(
            f"weight {name} cannot be pruned.", "add its axes to AXES in recipes/pruning/kept.py"
        )
    return AXES[name_end]


def student_name(name: str, kept: KeptIndices) -> str | None:
    """Returns the student's name of a teacher's weight; ``None`` if its layer or expert is pruned.

    Layers and experts are renumbered without gaps. Both names are Hugging Face names.
    """
    layer_match = LAYER_INDEX.search(name)
    if not layer_match:  # embedding, final norm or head
        return name
    layer = int(layer_match.group()) + 1
    if layer not in kept.layers:
        return None
    expert_match = _EXPERT_INDEX.search(name)
    expert_indices = kept.indices.get(f"layers.{layer}.{EXPERTS}")  # None: all experts are kept
    if expert_match and expert_indices is not None:
        expert, kept_experts = int(expert_match.group()), expert_indices.tolist()
        if expert not in kept_experts:
            return None
        name = _EXPERT_INDEX.sub(str(kept_experts.index(expert)), name)
    return LAYER_INDEX.sub(str(kept.layers.index(layer)), name)


def prune_weight(name: str, weight: Tensor, kept: KeptIndices, head_size: int) -> Tensor:
    """Returns the kept rows and columns of a teacher's weight, in the order of ``kept``.

    ``name`` is the weight's Hugging Face name in the teacher. ``weight`` may also be a change of
    this weight. ``head_size`` is the number of channels of one attention head.
    """
    layer_match, expert_match = LAYER_INDEX.search(name), _EXPERT_INDEX.search(name)
    layer = f"layers.{int(layer_match.group()) + 1}." if layer_match else ""
    for dim, axis in enumerate(axes_of(name)):
        if axis == HIDDEN:
            key = HIDDEN  # all layers share hidden channels
        elif axis == FFN and expert_match:
            key = f"{layer}experts.{expert_match.group()}.{EXPERT_FFN}"
        else:
            key = f"{layer}{axis}"
        indices = kept.indices.get(key)  # ``None`` if the axis is not pruned
        if indices is not None:
            if axis in (HEADS, GROUPS):
                indices = _channels_of_heads(indices, head_size)
            weight = weight.index_select(dim, indices.to(weight.device))
    return weight


def _channels_of_heads(heads: Tensor, head_size: int) -> Tensor:
    """Returns the indices of all channels of these heads: ``head_size`` for each head."""
    return (heads[:, None] * head_size + torch.arange(head_size)).flatten()


def leading_submatrix(
    name: str, weight: Tensor, student: Architecture, teacher: Architecture
) -> Tensor:
    """Returns the student's rows and columns of a weight of a teacher, which must be dense.

    ``name`` is the weight's Hugging Face name. ``weight`` must be sorted in the order of
    ``sort_indices``. The result is a view, unless heads are pruned within groups.
    """
    for dim, axis in enumerate(axes_of(name)):
        if axis in (HIDDEN, FFN):
            weight = weight.narrow(dim, 0, getattr(student, axis))
        elif axis == GROUPS:
            weight = weight.narrow(dim, 0, student.num_query_groups * teacher.kv_channels)
        elif axis == HEADS:
            weight = _first_heads(weight, dim, student, teacher)
    return weight


def _first_heads(weight: Tensor, dim: int, student: Architecture, teacher: Architecture) -> Tensor:
    """Returns the channels of the student's heads: the first heads of each of the first groups."""
    # Channels of the query heads of one group
    teacher_channels, student_channels = (
        arch.num_attention_heads // arch.num_query_groups * teacher.kv_channels
        for arch in (teacher, student)
    )
    if student_channels == teacher_channels:  # only whole groups are pruned
        return weight.narrow(dim, 0, student.num_query_groups * student_channels)
    grouped = weight.unflatten(dim, (teacher.num_query_groups, teacher_channels))
    grouped = grouped.narrow(dim, 0, student.num_query_groups)
    return grouped.narrow(dim + 1, 0, student_channels).flatten(dim, dim + 1)
