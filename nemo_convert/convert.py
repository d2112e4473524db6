"""Converts between Hugging Face and NeMo in both directions, bit for bit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from nemo_convert import nemo
from nemo_convert.architecture import Architecture
from nemo_convert.families import FAMILIES, Family
from nemo_convert.hf import Weights, copy_side_files, write_weights
from nemo_convert.hf_config import as_transformers_4, read_architecture
from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROTARY_BUFFER = "rotary_emb.inv_freq"
"""Old checkpoints store it; it follows from the config."""


class Readable(Protocol):
    """Weights by their Hugging Face names."""

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor."""

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuses a tensor that is missing or of another shape."""


class MergedWeights:
    """Makes Megatron weights on demand from Hugging Face ones, by key and (layer, expert)."""

    def __init__(self, weights: Readable, arch: Architecture, family: Family) -> None:
        self._weights, self._arch = weights, arch
        self._rows = {f"module.{weight.stored}": weight for weight in family.weights}
        for weight, numbers in family.weights_of(arch):
            whole = torch.empty(weight.shape(arch), device="meta")
            for name, part in zip(weight.hf_names(numbers), weight.split(arch, whole), strict=True):
                weights.require(name, tuple(part.shape))

    def __call__(self, key: str, index: tuple[int, ...]) -> torch.Tensor:
        """Returns the weight of a key at a layer and expert."""
        weight = self._rows[key]
        numbers = dict(zip(weight.counts(self._arch), index, strict=True))
        return weight.merge(self._arch, [self._weights.read(n) for n in weight.hf_names(numbers)])


def check_vocabulary(folder: Path, arch: Architecture) -> None:
    """Refuses a tokenizer with more tokens than the model has embeddings."""
    from transformers import AutoTokenizer

    try:
        size = len(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"{folder} has no usable tokenizer: {reason}", "save the tokenizer beside the model"
        ) from error
    if size > arch.vocab_size:
        raise RecipeError(
            f"{folder}: the tokenizer has {size} tokens, the model's vocabulary {arch.vocab_size}.",
            "use the tokenizer that the model was trained with",
        )


def check_names(weights: Weights, arch: Architecture, family: Family) -> None:
    """Refuses weights that a model of this shape does not have, and a head that is not tied.

    transformers 5 keeps a stored head that differs from a tied embedding; transformers 4 drops it.

    Raises:
        RecipeError: A weight would be lost.
    """
    expected = {name for w, numbers in family.weights_of(arch) for name in w.hf_names(numbers)}
    extra = {n for n in weights.names() - expected if not n.endswith(ROTARY_BUFFER)}
    if arch.tied_embeddings and HEAD in extra:
        extra.remove(HEAD)
        if not torch.equal(weights.read(HEAD), weights.read(EMBEDDING)):
            raise RecipeError(
                f"{weights.folder}: {HEAD} differs from {EMBEDDING}, but tie_word_embeddings is "
                "true in config.json.",
                "set tie_word_embeddings to false in config.json",
            )
    if extra:
        named = ", ".join(sorted(extra)[:3])
        raise RecipeError(
            f"{weights.folder} has {len(extra)} weights that {arch.hf_architecture} does not "
            f"have, such as {named}.",
            "use the model without them; they would be lost",
        )


def to_nemo(hf_folder: Path, checkpoint: Path) -> None:
    """Converts a Hugging Face folder to a NeMo 2 checkpoint directory.

    Two weights are in memory at a time: the one being written and the next. Megatron's model is
    built only for its plan of the checkpoint; the memory of its weights is never touched.
    """
    from nemo_convert.streaming import StreamedSave

    arch = read_architecture(read_json(hf_folder / "config.json"), str(hf_folder))
    check_vocabulary(hf_folder, arch)
    weights, family = Weights(hf_folder), FAMILIES[arch.hf_architecture]
    check_names(weights, arch, family)
    source = MergedWeights(weights, arch, family)
    nemo.initialize(nemo.Parallelism())
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as temporary:
        side = Path(temporary) / nemo.SIDE
        copy_side_files(hf_folder, side)
        hf_config = read_json(side / "config.json")
        if (converted := as_transformers_4(hf_config, str(hf_folder))) != hf_config:
            write_json(side / "config.json", converted, indent=2)
        model = nemo.new_model(side)
        core = nemo.build_core(model, nemo.Parallelism())
        strategy = StreamedSave(source, nemo.leading_axes(arch))
        nemo.save_checkpoint(checkpoint, model, core, side, rank=0, strategy=strategy)


def hf_weights(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a NeMo checkpoint's weights under their Hugging Face names."""
    arch = nemo.architecture_of(checkpoint)
    rows = FAMILIES[arch.hf_architecture].rows(arch)
    for name, tensor in nemo.read_weights(checkpoint):
        weight, numbers = rows[name]
        yield from zip(weight.hf_names(numbers), weight.split(arch, tensor), strict=True)


def to_hf(checkpoint: Path, hf_folder: Path) -> None:
    """Converts a NeMo 2 checkpoint directory to a new Hugging Face folder, atomically."""
    if hf_folder.exists() and any(hf_folder.iterdir()):
        raise RecipeError(f"{hf_folder} exists and is not empty.", "choose another directory")
    partial = hf_folder.with_name(hf_folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy_side_files(nemo.side_files(checkpoint), partial)
    config = nemo.read_config(checkpoint)
    # Without it, transformers derives head_dim from the hidden size, which pruning may change.
    config["head_dim"] = nemo.architecture_of(checkpoint).kv_channels
    write_json(partial / "config.json", config, indent=2)
    write_weights(hf_weights(checkpoint), partial)
    if hf_folder.exists():
        hf_folder.rmdir()
    partial.rename(hf_folder)
