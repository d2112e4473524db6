"""Writes the inputs of a rehearsed stage. They have the right shapes, but no weights or text."""

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
from nemo_convert.hf_config import as_transformers_4, read_architecture, with_shape
from recipes.core.files import write_json
from recipes.core.manifest import ARTIFACT, Manifest
from recipes.core.stage import Input
from recipes.data.corpus import SPLITS
from recipes.data.results import DatasetResult, SourceTokens
from recipes.distillation.logit_cache import SHARD, CacheIndex, write_index
from recipes.distillation.results import KeptLayers
from recipes.distillation.settings import CACHE_KIND
from recipes.planning.results import Cell, PlanResult
from recipes.pruning.kept import Importance, select_indices
from recipes.pruning.settings import LAYER_METHODS
from recipes.rehearsal.files import write_zeros
from recipes.rehearsal.job import JobInput, RankJob
from recipes.search.settings import SHAPES_FILE

END = "<end>"
"""The tokenizer's only special token; every other token is a byte."""


def inputs(job: RankJob, run_dir: Path) -> dict[str, Input]:
    """Writes all inputs of a job below a run's directory, and returns them by role."""
    by_role = {role: _input(job, source, run_dir / role) for role, source in job.inputs.items()}
    hashes = {role: source.manifest.content_hash() for role, source in by_role.items()}
    # Training compares its text with the hash of the text in a cached teacher's manifest.
    for source in by_role.values():
        source.manifest.input_content = hashes
    return by_role


def settings(job: RankJob, run_dir: Path) -> dict[str, Any]:
    """Returns a job's settings. Changes ``weights`` and ``hf_path`` for the generated inputs."""
    if any(source.kind == CACHE_KIND for source in job.inputs.values()):
        # If text sources have weights, each needs a cached sequence. But all sequences of the
        # generated cache are sequence 0 of the text, which is in the first source.
        return {**job.config, "weights": {}}
    if "hf_path" not in job.config:
        return job.config
    return {**job.config, "hf_path": str(_hf_folder(job.hf_config, run_dir / "model"))}


def _hf_folder(config: Mapping[str, Any], folder: Path) -> Path:
    """Writes a Hugging Face folder whose weights are a sparse file of zeros."""
    _write_side_files(config, folder)
    arch = read_architecture(config, "a rehearsal")
    shapes = FAMILIES[arch.hf_architecture].hf_shapes(arch)
    tensors = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    write_zeros(folder / "model.safetensors", tensors)
    return folder


def _input(job: RankJob, source: JobInput, directory: Path) -> Input:
    """Writes one input to a directory like that of the stage that makes such an input."""
    artifact = directory / ARTIFACT
    artifact.mkdir(parents=True)
    shape, teacher = Architecture(**source.shape), read_architecture(job.hf_config, "a rehearsal")
    manifest = _empty_manifest(directory.name, source.kind)
    if source.kind == "dataset":
        manifest.metrics = asdict(_write_dataset(job.config, artifact))
    elif source.kind == "importance":
        # All scores, and the teacher's loss, are placeholders.
        layers = dict.fromkeys(range(1, shape.num_layers + 1), 1.0)
        scores = Importance(1.0, dict.fromkeys(LAYER_METHODS, layers), widths=_width_scores(shape))
        scores.save(artifact)
    elif source.kind == "shapes":  # only the teacher's shape; no candidate needs more memory
        write_json(artifact / SHAPES_FILE, [shape.as_dict()])
        limits: dict[str, Cell] = {"parameters": shape.parameters()}
        manifest.config = {"budget": limits}
        manifest.metrics = asdict(PlanResult(limits, tables=[]))
    elif source.kind == CACHE_KIND:
        _write_logit_cache(source, job.config["global_batch_size"], artifact)
    else:
        _write_checkpoint(with_shape(job.hf_config, shape), artifact / "model.nemo")
        if shape != teacher:  # a pruned model, whose artifact also has the kept indices
            kept_layers = list(range(1, shape.num_layers + 1))
            select_indices(_width_scores(teacher), teacher, shape, kept_layers).save(artifact)
            manifest.metrics = asdict(KeptLayers(kept_layers))
        manifest.architecture, manifest.parameters = shape.as_dict(), shape.parameters()
    return Input(directory, manifest)


def _write_checkpoint(config: Mapping[str, Any], checkpoint: Path) -> None:
    """Writes a NeMo checkpoint without weights."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / nemo.SIDE
        _write_side_files(config, folder)
        (checkpoint / nemo.WEIGHTS).mkdir(parents=True)
        save_config(CheckpointingConfig("torch_dist"), str(checkpoint / nemo.WEIGHTS))
        nemo.write_context(checkpoint, nemo.new_model(folder), folder)


def _write_side_files(config: Mapping[str, Any], folder: Path) -> None:
    """Writes the files beside a model's weights: ``config.json``, and a tokenizer for bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    # The ``config.json`` files of this repository lack a dtype: they have only the model's shape.
    settings = {"torch_dtype": "bfloat16", **as_transformers_4(config, "a rehearsal")}
    write_json(folder / "config.json", settings)
    tokens = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


def _write_dataset(config: Mapping[str, Any], artifact: Path) -> DatasetResult:
    """Writes each split as a sparse file of zeros, which is one document.

    Each source in a split has as many sequences as a stage with the settings ``config`` can read.
    """
    count_names = ("global_batch_size", "num_sequences", "num_calibration_samples", "num_samples")
    sequences = max(config.get(name) or 1 for name in count_names)
    sources = list(config.get("weights") or ["rehearsal"])
    # One sequence is added, because a sequence that spans two sources is not used. One token is
    # added, which the last sequence of the split predicts last.
    source_tokens = (sequences + 1) * config.get("seq_length", 1) + 1
    split_tokens = len(sources) * source_tokens
    for split in SPLITS:
        builder = IndexedDatasetBuilder(f"{artifact / split}.bin", dtype=np.int32)
        builder.sequence_lengths.append(split_tokens)
        builder.document_indices.append(1)  # to Megatron, the document is one sequence
        builder.data_file.truncate(split_tokens * np.dtype(np.int32).itemsize)
        builder.finalize(f"{artifact / split}.idx")
    tokens_by_source = [SourceTokens(name, source_tokens) for name in sources]
    return DatasetResult(
        documents=dict.fromkeys(SPLITS, 1),
        tokens=dict.fromkeys(SPLITS, split_tokens),
        sources=sources,
        source_tokens=dict.fromkeys(SPLITS, tokens_by_source),
        document_end=0,
    )


def _write_logit_cache(source: JobInput, sequences: int, artifact: Path) -> None:
    """Writes a shard of zeros with a number of sequences, and an index with ``source.config``."""
    index = CacheIndex(source.shape["vocab_size"], **source.config, shards=1)
    write_index(artifact, index)
    tensors = {
        name: (dtype, [sequences, index.seq_length, size])
        for name, (dtype, size) in index.tensors.items()
    }
    shard = {"sequences": (torch.int32, [sequences]), **tensors}
    write_zeros(artifact / SHARD.format(0), shard)


def _width_scores(shape: Architecture) -> dict[str, torch.Tensor]:
    """Returns scores for ``Importance.widths``: zero for all channels and heads."""
    widths = {}
    for layer in range(1, shape.num_layers + 1):
        widths[f"layers.{layer}.ffn_hidden_size"] = torch.zeros(shape.ffn_hidden_size)
        widths[f"layers.{layer}.num_attention_heads"] = torch.zeros(shape.num_attention_heads)
    widths["hidden_size"] = torch.zeros(shape.hidden_size)
    return widths


def _empty_manifest(stage: str, kind: str) -> Manifest:
    """Returns a manifest with placeholders, except for the stage and the type of the artifact."""
    return Manifest(
        stage=stage,
        kind=kind,
        fingerprint="rehearsal",
        config={},
        code="",
        inputs={},
        tokenizer_sha256="rehearsal",
        started_at="",
    )
