"""Converts between Hugging Face and NeMo in both directions, bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol

import torch

from nemo_convert import nemo
from nemo_convert.architecture import Architecture
from nemo_convert.families import FAMILIES, OUTPUT_LAYER, Family
from nemo_convert.generation_config import move_settings, require_loadable_generation_config
from nemo_convert.hf import Weights, copy_side_files, write_weights
from nemo_convert.hf_config import as_transformers_4, read_architecture, rms_norm_eps, rope_theta
from nemo_convert.preflight import model_dtype, require_convertible, require_sound_side_files
from nemo_convert.scratch import scratch_beside
from nemo_convert.tokenizer_conversion import convert_tokenizer
from nemo_convert.tokenizer_files import load_tokenizer
from nemo_convert.trust import MODEL_NAMES, explain_damage, read_metadata, require_tensors
from recipes.core.errors import RecipeError
from recipes.core.files import read_json, write_json

NEMO_VALUES: dict[str, Any] = {
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "layernorm_zero_centered_gamma": False,
    "moe_router_topk_scaling_factor": None,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,
    "softmax_scale": None,
    "window_size": None,
}
"""Fields of NeMo's model config that affect logits, with the only values that a conversion gives
them."""
ROPE_FIELDS = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}
"""Fields of NeMo's model config, with their keys in ``rope_scaling`` of ``config.json``."""
NO_SCALING = "none"
"""Value of the field ``scale_factor``, in this module, for models without RoPE scaling."""


class WeightReader(Protocol):
    """Reads weights by their Hugging Face names."""

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor."""


class MergedWeights:
    """Builds one Megatron weight per call: reads and merges the Hugging Face weights for it."""

    def __init__(self, weights: WeightReader, arch: Architecture, family: Family) -> None:
        self._weights, self._arch = weights, arch
        self._by_key = {weight.checkpoint_key: weight for weight in family.weights}

    def __call__(self, key: str, index: tuple[int, ...]) -> torch.Tensor:
        """Returns the weight at ``index`` of the stack that a checkpoint stores under ``key``.

        ``index`` is the position on the leading axes: (layer, expert), (layer,) or ().
        """
        weight = self._by_key[key]
        indices = dict(zip(weight.stack_sizes(self._arch), index, strict=True))  # {"i": layer, …}
        tensors = [self._weights.read(name) for name in weight.hf_names(indices)]
        return weight.merge(self._arch, tensors)


class FiniteWeights(Weights):
    """Reads the weights of a folder; refuses those with NaN or infinite values."""

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor."""
        tensor = super().read(name)
        # aminmax returns NaN if any value is NaN.
        if not all(value.isfinite() for value in tensor.aminmax()):
            what = f"weight {name} has NaN or infinite values."
            raise RecipeError(what, "the model is damaged; use another")
        return tensor


def to_nemo(hf_folder: Path, checkpoint: Path) -> None:
    """Converts a Hugging Face folder to a NeMo 2 checkpoint directory.

    If the weights have different dtypes, all become float32, which holds their values exactly.

    At most three weights are in memory: the one being written and the next two. Megatron's model
    is built only for its sharded state dict. Its weights stay uninitialized, so they take no
    physical memory.

    Raises:
        RecipeError: The folder has a fault, such as a tokenizer that cannot be loaded, or a weight
            that is NaN or infinite.
    """
    from nemo_convert.streaming import StreamedSave

    require_convertible(str(hf_folder))
    weights = FiniteWeights(hf_folder)
    old_config = read_json(hf_folder / "config.json")
    config = as_transformers_4(old_config, str(hf_folder))
    config["torch_dtype"] = model_dtype(weights.headers)
    arch = read_architecture(config, str(hf_folder))
    source = MergedWeights(weights, arch, FAMILIES[arch.hf_architecture])
    nemo.initialize(nemo.Parallelism())
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as temporary:
        side = Path(temporary) / nemo.SIDE  # config, tokenizer and licence
        copy_side_files(hf_folder, side)
        convert_tokenizer(side)
        move_settings(old_config, side)
        require_loadable_generation_config(side)
        write_json(side / "config.json", config, indent=2)
        model = nemo.new_model(side)
        core = nemo.build_core(model, nemo.Parallelism())
        strategy = StreamedSave(source, nemo.leading_axes(arch))
        nemo.save_checkpoint(checkpoint, model, core, side, rank=0, strategy=strategy)


def hf_weights(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a NeMo checkpoint's weights under their Hugging Face names."""
    arch = nemo.architecture_of(checkpoint)
    by_name = FAMILIES[arch.hf_architecture].by_megatron_name(arch)
    for name, tensor in nemo.read_weights(checkpoint):
        weight, indices = by_name[name]
        yield from zip(weight.hf_names(indices), weight.split(arch, tensor), strict=True)


def require_sound(checkpoint: Path) -> None:
    """Refuses a NeMo checkpoint with damaged side files, or with the config of another model.

    Side files are also damaged if transformers refuses the tokenizer or the generation config.
    Reads no weights.
    """
    require_matching_config(checkpoint)
    side = nemo.side_folder(checkpoint)
    require_sound_side_files(side, nemo.architecture_of(checkpoint))
    load_tokenizer(side)
    require_loadable_generation_config(side)


def require_matching_config(checkpoint: Path) -> None:
    """Refuses a NeMo checkpoint whose ``config.json`` describes another model than its files.

    The files are the weights, of which only the shapes are read, and NeMo's config in ``context/``.
    """
    arch, config = nemo.architecture_of(checkpoint), nemo.read_config(checkpoint)
    family = FAMILIES[arch.hf_architecture]
    differences = different_shapes(checkpoint, arch)
    # Fields of NeMo's model config, with their values according to config.json.
    expected = {name: getattr(arch, name) for name in arch.megatron_to_hf()}
    expected |= {"rotary_base": rope_theta(config), "layernorm_epsilon": rms_norm_eps(config)}
    scaling = config.get("rope_scaling") or {}
    expected |= {"scale_factor": scaling.get("factor", NO_SCALING), **NEMO_VALUES}
    expected |= {name: scaling[key] for name, key in ROPE_FIELDS.items() if key in scaling}
    if arch.num_moe_experts:
        expected |= {"moe_router_topk": arch.moe_router_topk, **family.corrections(config)}
    actual = _context_settings(checkpoint)
    # Fields that are null are not compared, because NeMo computes them.
    differences += [
        f"{name}={actual[name]} in {nemo.CONTEXT}/io.json instead of {value}"
        for name, value in expected.items()
        if actual.get(name) not in (None, value)
    ]
    if differences:
        raise RecipeError(
            f"{checkpoint} is not the {arch.hf_architecture} model that its config.json describes: "
            f"it has {', '.join(differences)}.",
            f"copy the config.json of this model to {nemo.side_folder(checkpoint)}",
        )


def different_shapes(checkpoint: Path, arch: Architecture) -> list[str]:
    """Lists the weights of a checkpoint that do not have the shapes that ``arch`` implies."""
    weights = {
        weight.checkpoint_key: weight
        for weight in FAMILIES[arch.hf_architecture].weights
        if not (arch.tied_embeddings and weight.megatron == OUTPUT_LAYER)
    }
    metadata = read_metadata(checkpoint / nemo.WEIGHTS)
    require_tensors(metadata, weights, checkpoint / nemo.WEIGHTS)
    stored = metadata.state_dict_metadata
    names = (key for key in stored if key.startswith("module.") and nemo.EXTRA_STATE not in key)
    differences = [f"the weight {name}" for name in sorted(set(names) - weights.keys())]
    for key, weight in weights.items():
        shape = tuple(stored[key].size) if key in stored else None
        expected = (*weight.stack_sizes(arch).values(), *weight.shape(arch))  # layer, expert, …
        if shape != expected:
            differences.append(f"{weight.megatron} of shape {shape} instead of {expected}")
    return differences


def _context_settings(checkpoint: Path) -> dict[str, Any]:
    """Returns the plain values of NeMo's model config, by field.

    Reads ``io.json`` as plain JSON, because NeMo's own reader may run code. In this file, ``items``
    is a list of (label, value) pairs, and ``Attr(name='FIELD')`` is the label of a field.
    """
    file = checkpoint / nemo.CONTEXT / "io.json"
    if not (objects := read_json(file).get("objects")):
        raise RecipeError(f"{file} has no objects.", "copy or convert the checkpoint again")
    with explain_damage(file):
        path = "<root>.model.config"
        configs = [item for item in objects.values() if path in item.get("paths", ())]
        if not configs:
            raise ValueError("it has no model.config")
        config = configs[-1]
        # The metadata names the config's class. The file stores only arguments that were passed to
        # the class. The other fields have the class's defaults.
        settings = _class_defaults(dict(objects[config["metadata"]["key"]]["items"]))
        for label, value in config["items"]:
            if isinstance(value, dict):
                field_name = label.removeprefix("Attr(name='").removesuffix("')")
                settings[field_name] = value.get("value")
    return settings


def _class_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults of a config's class by field; none if the class is not NeMo's.

    ``metadata`` maps the labels of the config's metadata in ``io.json`` to their values.

    Raises:
        RecipeError: The installed NeMo does not have the class.
    """
    target = metadata["Attr(name='fn_or_cls')"]
    name = f"{target['module']}.{target['name']}"
    if not MODEL_NAMES.fullmatch(name):
        return {}
    try:
        defaults = {field.name: field.default for field in fields(resolve_name(name))}
    except (AttributeError, ImportError, TypeError) as error:
        what = f"io.json of the checkpoint names {name}, which the installed NeMo does not have."
        raise RecipeError(what, "convert the original Hugging Face model again") from error
    return {"scale_factor": NO_SCALING, **defaults}


def to_hf(checkpoint: Path, hf_folder: Path) -> None:
    """Converts a NeMo 2 checkpoint directory to a new Hugging Face folder, atomically.

    Raises:
        RecipeError: The folder is not empty, or ``require_matching_config`` refuses the checkpoint.
    """
    require_new(hf_folder)
    with scratch_beside(hf_folder) as scratch:
        partial = scratch / hf_folder.name
        _write_hf(checkpoint, partial)
        partial.rename(hf_folder)


def require_new(folder: Path) -> None:
    """Raises ``RecipeError`` if a folder exists and is not empty, or is a file or a link."""
    if folder.is_symlink():  # a finished folder cannot replace a link
        raise RecipeError(f"{folder} is a symbolic link.", "choose another directory")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} exists and is not empty.", "choose another directory")


def _write_hf(checkpoint: Path, folder: Path) -> None:
    """Writes the side files, ``config.json`` and weights of a checkpoint in Hugging Face format."""
    require_matching_config(checkpoint)
    copy_side_files(nemo.side_folder(checkpoint), folder)
    config = nemo.read_config(checkpoint)
    # Without head_dim, transformers computes hidden_size / heads, which is wrong after pruning.
    config["head_dim"] = nemo.architecture_of(checkpoint).kv_channels
    write_weights(hf_weights(checkpoint), folder)
    if "torch_dtype" not in config:  # NeMo requires it
        config["torch_dtype"] = model_dtype(Weights(folder).headers)
    write_json(folder / "config.json", config, indent=2)
