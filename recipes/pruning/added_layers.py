"""Adds layers of the teacher to a student that lacks them, without training.

A student that was pruned in depth only, and then distilled, keeps the teacher's residual stream. So
the teacher's layers fit between the student's layers. Adding them one by one gives models of all
sizes between student and teacher ("Boomerang distillation", arXiv:2510.05064).
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_convert.convert import hf_weights
from recipes.core.errors import RecipeError
from recipes.core.metrics import ProgressCallback
from recipes.core.precision import dtype_of
from recipes.data.token_sequences import TextSequences
from recipes.evaluation.predictions import (
    TEACHER,
    Predictor,
    compare_predictions,
    compute_states,
)
from recipes.evaluation.results import SizeQuality
from recipes.evaluation.text_quality import Scores, load_transformers
from recipes.pruning.kept import LAYER_INDEX
from recipes.pruning.settings import AddLayersConfig

STUDENT = "student"


def layers_of_student(
    student_layers: Sequence[int] | None, teacher_layers: Sequence[int]
) -> list[int]:
    """Returns the teacher's layer, counted from 1, that each layer of the student comes from.

    The arguments number layers as in the model before all pruning: they are
    ``KeptLayers.kept_layers`` of both models, or all layers of a teacher that was not pruned.

    Raises:
        RecipeError: The origin of the student's layers is not known, or is another model.
    """
    if student_layers is None or not set(student_layers) <= set(teacher_layers):
        raise RecipeError(
            f"the student's layers are not layers of the teacher: {student_layers or 'not known'}",
            "use a student that was pruned from this teacher, and that teacher",
        )
    return [teacher_layers.index(layer) + 1 for layer in student_layers]


def layers_by_size(kept: Collection[int], num_layers: int) -> list[list[int]]:
    """Returns the layers of each model, from the student to one layer less than the teacher.

    Each model adds one layer to the model before: the teacher's first layer that is still missing.
    ``kept`` are the teacher's layers that the student has. ``num_layers`` is the teacher's number
    of layers. Layers are counted from 1, as in the teacher.
    """
    dropped = [layer for layer in range(1, num_layers + 1) if layer not in kept]
    return [sorted({*kept, *dropped[:count]}) for count in range(len(dropped))]


def combine_weights(
    student: Path, teacher: Path, kept: Sequence[int], layers: Sequence[int]
) -> dict[str, Tensor]:
    """Returns the weights of a student with added layers, by their Hugging Face names.

    Args:
        student: NeMo checkpoint; all of its weights are in the result.
        teacher: NeMo checkpoint; provides the layers that the student does not have.
        kept: The teacher's layer that each layer of the student comes from, counted from 1.
        layers: The layers of the combined model, also as numbers of the teacher's layers.
    """
    # Names of weights count layers from 0. Each mapping is from the old index to the new one.
    teacher_indices = {layer - 1: layers.index(layer) for layer in layers if layer not in kept}
    student_indices = {index: layers.index(layer) for index, layer in enumerate(kept)}
    # Both models have embeddings, final norm and head. The student's overwrite the teacher's.
    return {
        **_renumbered_weights(teacher, teacher_indices),
        **_renumbered_weights(student, student_indices),
    }


def _renumbered_weights(checkpoint: Path, new_indices: Mapping[int, int]) -> dict[str, Tensor]:
    """Returns weights by new name: those outside layers, and those of layers in ``new_indices``."""
    weights = {}
    for name, weight in hf_weights(checkpoint):
        match = LAYER_INDEX.search(name)
        if match is None:
            weights[name] = weight
        elif (index := new_indices.get(int(match.group()))) is not None:  # else left out
            weights[LAYER_INDEX.sub(str(index), name)] = weight
    return weights


def measure_sizes(
    cfg: AddLayersConfig,
    student: Path,
    teacher: Path,
    kept: Sequence[int],
    text: TextSequences,
    progress: ProgressCallback,
) -> dict[int, SizeQuality]:
    """Compares each model of ``layers_by_size`` with the teacher.

    ``student`` and ``teacher`` are NeMo checkpoints. ``kept`` has the teacher's layer, counted from
    1, that each layer of the student comes from. ``progress`` is called after each model.

    Returns:
        The quality of each model by its number of layers.
    """
    dtype = dtype_of(cfg.precision)
    model = load_transformers(teacher, dtype)
    teacher_states = compute_states(Predictor.of(model), text, cfg.micro_batch_size)
    teacher_modules = dict(enumerate(model.model.layers, start=1))
    layer_lists = layers_by_size(kept, len(teacher_modules))
    modules = {layer: module for layer, module in teacher_modules.items() if layer not in kept}
    del model, teacher_modules  # frees the layers that the student replaces
    gc.collect()
    model = load_transformers(student, dtype)
    modules |= dict(zip(kept, model.model.layers, strict=True))
    predictor = Predictor.of(model)  # always runs the current ``model.model.layers``
    qualities = {}
    for number, layers in enumerate(layer_lists, start=1):
        model.model.layers = torch.nn.ModuleList(modules[layer] for layer in layers)
        model.config.num_hidden_layers = len(layers)
        states = compute_states(predictor, text, cfg.micro_batch_size)
        metrics = compare_predictions({TEACHER: teacher_states, STUDENT: states}, text)[STUDENT]
        parameters = sum(weight.numel() for weight in model.parameters())
        scores = Scores.of(metrics, text)
        whole_text = vars(scores.quality())  # ``SizeQuality`` has these fields, too
        by_source = {name: scores.quality(span) for name, span in text.sources.items()}
        qualities[len(layers)] = SizeQuality(**whole_text, parameters=parameters, sources=by_source)
        progress(number, len(layer_lists))
    return qualities
