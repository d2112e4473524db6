"""What a rehearsed stage is given: inputs of the right shapes, without weights or text."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from nemo_convert import nemo
from nemo_convert.architecture import Architecture
from nemo_convert.families import FAMILIES
from nemo_convert.hf_config import read_architecture, with_shape
from recipes.backend.without_cuda import enable
from recipes.core.files import write_json
from recipes.core.manifest import ARTIFACT, Manifest
from recipes.core.stage import Input
from recipes.data.corpus import PARTS
from recipes.data.results import DatasetResult, SourceTokens
from recipes.data.token_windows import prefix
from recipes.distillation.logit_cache import SHARD, CacheIndex, write_index
from recipes.distillation.settings import CACHED
from recipes.pruning.importance import Importance
from recipes.pruning.kept import choose
from recipes.pruning.settings import LAYER_METHODS
from recipes.rehearsal.files import write_zeros
from recipes.rehearsal.job import Given, RankJob
from recipes.search.settings import SHAPES_FILE

END = "<end>"
"""The only special token of the tokenizer, which has one for every byte beside it."""


def inputs(job: RankJob, run_dir: Path) -> dict[str, Input]:
    """All inputs of a job, below a run's directory; a cache is of its text."""
    made = {name: _input(job, given, run_dir / name) for name, given in job.inputs.items()}
    content = {name: one.manifest.content() for name, one in made.items()}
    for one in made.values():
        one.manifest.input_content = content
    return made


def settings(job: RankJob, run_dir: Path) -> dict[str, Any]:
    """A job's settings, with a model where they name one to read."""
    if "hf_path" not in job.config:
        return job.config
    return {**job.config, "hf_path": str(hf_folder(job.hf_config, run_dir / "model"))}


def hf_folder(config: Mapping[str, Any], folder: Path) -> Path:
    """A Hugging Face folder whose weights are zeros that take no room."""
    write_side_files(config, folder)
    arch = read_architecture(config, "a rehearsal")
    family = FAMILIES[arch.hf_architecture]
    shapes = {
        name: (torch.bfloat16, part.shape)
        for weight, numbers in family.weights_of(arch)
        for name, part in zip(
            weight.hf_names(numbers),
            weight.split(arch, torch.empty(weight.shape(arch), device="meta")),
            strict=True,
        )
    }
    write_zeros(folder / "model.safetensors", shapes)
    return folder


def _input(job: RankJob, given: Given, stage: Path) -> Input:
    shape = Architecture(**given.shape)
    if given.kind == "dataset":
        return dataset(job.tokens, stage)
    if given.kind == "importance":
        return importance(shape, stage)
    if given.kind == "shapes":
        return shapes(shape, stage)
    if given.kind == CACHED:
        return logit_cache(given, job.config["global_batch_size"], stage)
    made = checkpoint(job.hf_config, shape, stage)
    whole = read_architecture(job.hf_config, "a rehearsal")
    if shape != whole:  # it was cut, so it says what was kept
        layers = list(range(1, shape.num_layers + 1))
        choose(equal_widths(whole), whole, shape, layers).save(made.artifact)
    return made


def checkpoint(config: Mapping[str, Any], shape: Architecture, stage: Path) -> Input:
    """A NeMo checkpoint without weights.

    Args:
        config: The teacher's ``config.json``.
        shape: What it is changed to.
        stage: Directory of the stage that would have made it.
    """
    enable()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / nemo.SIDE
        write_side_files(with_shape(config, shape), folder)
        made = stage / ARTIFACT / "model.nemo"
        (made / nemo.WEIGHTS).mkdir(parents=True)
        save_config(CheckpointingConfig("torch_dist"), str(made / nemo.WEIGHTS))
        nemo.write_context(made, nemo.new_model(folder), folder)
    return Input(stage, _manifest(stage, "checkpoint_nemo", shape))


def write_side_files(config: Mapping[str, Any], folder: Path) -> None:
    """Writes a config, and a tokenizer of bytes: a rehearsal reads no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    write_json(folder / "config.json", {**_usual(config), **config})
    letters = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


def _usual(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundled config, which says a model's shape, leaves out."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = {name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    return {"torch_dtype": "bfloat16", "model_type": types[config["architectures"][0]]}


def dataset(tokens: int, stage: Path) -> Input:
    """Token windows, so many tokens in each part; sparse files, which take no room."""
    artifact = stage / ARTIFACT
    artifact.mkdir(parents=True)
    for part in PARTS:
        builder = IndexedDatasetBuilder(f"{prefix(artifact, part)}.bin", dtype=np.int32)
        builder.sequence_lengths.append(tokens)
        builder.document_indices.append(1)
        builder.data_file.truncate(4 * tokens)
        builder.finalize(f"{prefix(artifact, part)}.idx")
    every = dict.fromkeys(PARTS, tokens)
    of_source = [SourceTokens("rehearsal", tokens)]
    result = DatasetResult(
        dict.fromkeys(PARTS, 1), every, ["rehearsal"], dict.fromkeys(PARTS, of_source), 0
    )
    return Input(stage, _manifest(stage, "dataset", result=asdict(result)))


def logit_cache(given: Given, windows: int, stage: Path) -> Input:
    """What a teacher said of so many windows, as it is stored; nothing likely."""
    index = CacheIndex(given.shape["vocab_size"], **given.config, shards=1)
    (stage / ARTIFACT).mkdir(parents=True)
    write_index(stage / ARTIFACT, index)
    shard = {
        "windows": (torch.int32, [windows]),
        **{
            name: (dtype, [windows, index.seq_length, size])
            for name, (dtype, size) in index.tensors.items()
        },
    }
    write_zeros(stage / ARTIFACT / SHARD.format(0), shard)
    return Input(stage, _manifest(stage, CACHED))


def importance(shape: Architecture, stage: Path) -> Input:
    """Scores of all layers and widths, equal ones."""
    layers = dict.fromkeys(range(1, shape.num_layers + 1), 1.0)
    (stage / ARTIFACT).mkdir(parents=True)
    scores = Importance(1.0, dict.fromkeys(LAYER_METHODS, layers), widths=equal_widths(shape))
    scores.save(stage / ARTIFACT)
    return Input(stage, _manifest(stage, "importance"))


def equal_widths(shape: Architecture) -> dict[str, torch.Tensor]:
    """Scores of all channels and heads."""
    axes = {
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
    }
    layers = range(1, shape.num_layers + 1)
    widths = {f"layers.{i}.{axis}": torch.zeros(n) for i in layers for axis, n in axes.items()}
    return {**widths, "hidden_size": torch.zeros(shape.hidden_size)}


def shapes(shape: Architecture, stage: Path) -> Input:
    """The teacher's shape, which no smaller one needs more memory than."""
    (stage / ARTIFACT).mkdir(parents=True)
    write_json(stage / ARTIFACT / SHAPES_FILE, [shape.as_dict()])
    config = {"budget": {"parameters": shape.parameters()}}
    return Input(stage, _manifest(stage, "shapes", config=config))


def _manifest(
    stage: Path,
    kind: str,
    shape: Architecture | None = None,
    config: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
) -> Manifest:
    return Manifest(
        stage=stage.name,
        kind=kind,
        fingerprint="rehearsal",
        config=config or {},
        code="",
        inputs={},
        files={},
        metrics=result or {},
        architecture=shape.as_dict() if shape else None,
        parameters=shape.parameters() if shape else None,
        tokenizer_sha256="rehearsal",
        versions={},
        git_sha=None,
        started_at="",
        seconds=0,
        peak_rss_bytes=0,
    )
