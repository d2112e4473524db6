"""Cutting a NeMo checkpoint to a smaller shape, by scores made before (arXiv:2407.14679)."""

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
from recipes.backend.without_cuda import enable
from recipes.core.errors import RecipeError
from recipes.core.files import write_json
from recipes.pruning.importance import Importance
from recipes.pruning.kept import KeptIndices, cut, student_name


def layers_to_keep(importance: Importance, method: str, count: int) -> list[int]:
    """So many layers to keep, counted from 1; refuses scores that lack what the method needs.

    ``block_influence`` and ``loss`` keep the layers that score highest; ``block`` all but the block
    of layers that is missed least; ``greedy`` all but those that are missed least when left out one
    after the other.
    """
    every = sorted(importance.layers["block_influence"])
    drop = len(every) - count
    if drop == 0:
        return every
    if method in ("block", "greedy"):
        measured = (
            drop in importance.blocks if method == "block" else drop <= len(importance.greedy)
        )
        setting = f"block_sizes=[{drop}]" if method == "block" else f"num_greedy_layers={drop}"
    else:
        measured, setting = method in importance.layers, "num_loss_samples=8"
    if not measured:
        raise RecipeError(
            f"layer_importance={method}: the scores do not say which {drop} layers to drop.",
            f"set stages.score.{setting}",
        )
    if method == "block":
        starts = importance.blocks[drop]
        first = min(starts, key=lambda start: starts[start])
        dropped = set(range(first, first + drop))
    elif method == "greedy":
        dropped = set(importance.greedy[:drop])
    else:
        scores = importance.layers[method]
        dropped = set(sorted(every, key=lambda layer: scores[layer])[:drop])
    return [layer for layer in every if layer not in dropped]


def prune_checkpoint(teacher: Path, student: Architecture, kept: KeptIndices, out: Path) -> None:
    """Cuts ``teacher`` to what is kept, and writes it; refuses what does not fit ``student``."""
    weights = cut_weights(teacher, kept, student.kv_channels)
    save_weights(teacher, student, weights, out)


def save_weights(
    like: Path, shape: Architecture, weights: dict[str, torch.Tensor], out: Path
) -> None:
    """Writes weights, by their Hugging Face names, as a NeMo checkpoint of the same kind.

    Args:
        like: A checkpoint of such a model.
        shape: What of its config is other.
        weights: All of them; refused if they do not fit ``shape``.
        out: The new checkpoint.
    """
    enable()
    nemo.initialize(nemo.Parallelism())
    model = nemo.restore_model(like)
    config = with_shape(nemo.read_config(like), shape)
    for megatron in shape.hf_names():
        setattr(model.config, megatron, getattr(shape, megatron))
        setattr(model.__io__.config, megatron, getattr(shape, megatron))
    core = nemo.build_core(model, nemo.Parallelism())
    source = MergedWeights(NamedWeights(weights), shape, FAMILIES[shape.hf_architecture])
    strategy = StreamedSave(source, nemo.leading_axes(shape))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        side = Path(temporary) / nemo.SIDE
        copy_side_files(nemo.side_files(like), side)
        write_json(side / "config.json", config, indent=2)
        nemo.save_checkpoint(out, model, core, side, rank=0, strategy=strategy)


class NamedWeights:
    """A model's weights by their Hugging Face names, looked at as those of a folder are."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights = weights

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self._weights[name]

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuses a tensor that is not there, or has another shape than the config says."""
        found = tuple(self._weights[name].shape) if name in self._weights else None
        if found != shape:
            raise RecipeError(
                f"pruned weight {name} is {found} but the config says {shape}.",
                "convert the teacher again, whose weights are not of its config: force=[import_hf]",
            )


def cut_weights(teacher: Path, kept: KeptIndices, head_size: int) -> dict[str, torch.Tensor]:
    """The student's weights under their Hugging Face names."""
    return {
        name: cut(source, weight, kept, head_size)
        for source, weight in hf_weights(teacher)
        if (name := student_name(source, kept)) is not None
    }
