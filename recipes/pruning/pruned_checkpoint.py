"""Prunes a NeMo checkpoint to a smaller shape, by importance scores (arXiv:2407.14679)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from nemo_convert import nemo
from nemo_convert.architecture import Architecture
from nemo_convert.convert import MergedWeights, hf_weights
from nemo_convert.families import FAMILIES
from nemo_convert.hf import copy_side_files
from nemo_convert.hf_config import with_shape
from nemo_convert.streaming import StreamedSave
from recipes.backend.without_cuda import enable as enable_patches_without_cuda
from recipes.core.errors import RecipeError
from recipes.core.files import write_json
from recipes.pruning.kept import KeptIndices, prune_weight, student_name


def save_weights(
    like: Path, shape: Architecture, weights: dict[str, torch.Tensor], out: Path
) -> None:
    """Writes weights as a NeMo checkpoint.

    Args:
        like: NeMo checkpoint of the same family. Its tokenizer and similar files are copied. Its
            config is copied with the sizes of ``shape``.
        shape: The shape of the new model.
        weights: All weights by their Hugging Face names.
        out: Path of the new checkpoint.

    Raises:
        RecipeError: A weight is missing, or does not have the shape that ``shape`` implies.
    """
    enable_patches_without_cuda()
    nemo.initialize(nemo.Parallelism())
    model = nemo.restore_model(like)
    config = with_shape(nemo.read_config(like), shape)
    for name in shape.megatron_to_hf():
        for megatron_config in (model.config, model.__io__.config):  # the second one is saved
            setattr(megatron_config, name, getattr(shape, name))
    core = nemo.build_core(model, nemo.Parallelism())
    _require_shapes(weights, shape)
    source = MergedWeights(NamedWeights(weights), shape, FAMILIES[shape.hf_architecture])
    strategy = StreamedSave(source, nemo.leading_axes(shape))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        side_folder = Path(temporary) / nemo.SIDE
        copy_side_files(nemo.side_folder(like), side_folder)
        write_json(side_folder / "config.json", config, indent=2)
        nemo.save_checkpoint(out, model, core, side_folder, rank=0, strategy=strategy)


class NamedWeights:
    """A model's weights in memory, with the interface of ``nemo_convert.hf.Weights``."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights = weights

    def read(self, name: str) -> torch.Tensor:
        """Returns the weight with this Hugging Face name."""
        return self._weights[name]


def _require_shapes(weights: dict[str, torch.Tensor], shape: Architecture) -> None:
    """Checks that ``weights`` has every weight of a model of this shape, with the right size."""
    for name, expected in FAMILIES[shape.hf_architecture].hf_shapes(shape).items():
        actual = tuple(weights[name].shape) if name in weights else None
        if actual != expected:
            problem = "is missing" if actual is None else f"has shape {actual}"
            raise RecipeError(
                f"pruned weight {name} {problem}, but must have shape {expected} according to the "
                "config.",
                "convert the teacher again (force=[import_hf]): its weights do not fit its config",
            )


def prune_weights(teacher: Path, kept: KeptIndices, head_size: int) -> dict[str, torch.Tensor]:
    """Returns the student's weights by their Hugging Face names.

    ``teacher`` is a NeMo checkpoint. ``head_size`` is the channels of one attention head.
    """
    weights = {}
    for teacher_name, weight in hf_weights(teacher):
        name = student_name(teacher_name, kept)
        if name is not None:  # its layer and expert are kept
            weights[name] = prune_weight(teacher_name, weight, kept, head_size)
    return weights
