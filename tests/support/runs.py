"""Command-line overrides for runs with tiny models, and helpers for run directories."""

from __future__ import annotations

import shutil
from pathlib import Path

from recipes.core.manifest import ARTIFACT, Manifest, read_manifest

STAGES = [
    "plan",
    "import_hf",
    "prepare_data",
    "score",
    "prune",
    "distill",
    "evaluate",
    "export_hf",
    "report",
]
"""Stages of a pruning recipe with ``tasks=null engine=null``, in the order in which they run."""
HEALING_STAGES = [*STAGES[:5], "heal", *STAGES[5:]]
"""``STAGES`` with the stage ``heal``, which ``heal=least_squares`` adds."""
DISTILL = {
    "max_steps": 4,
    "warmup_steps": 1,
    "global_batch_size": 4,
    "tensor_model_parallel_size": 1,
    "resources.nodes": 1,
    "resources.devices": 1,
    "val_check_interval": 4,
    "limit_val_batches": 2,
    "checkpoint_interval": 4,
}
"""Settings of the stage ``distill`` with which a recipe for a large model trains 4 steps on one
device."""


def tiny(model: Path, text_file: Path | str, run_dir: Path, seq_length: int = 64) -> list[str]:
    """Returns the overrides of a run of a tiny model on the text of a file.

    Args:
        model: Folder of a Hugging Face model.
        text_file: JSON lines with the key ``text``, or several data sources, joined by commas.
        run_dir: Directory of the run.
        seq_length: Tokens per sequence.
    """
    return [
        f"model.hf_path={model}",
        f"data.sources=[{text_file}]",
        "data.heldout_sources=[]",
        "data.text_field=text",
        f"data.seq_length={seq_length}",
        f"run_dir={run_dir}",
    ]


def settings(stage: str, **values: object) -> list[str]:
    """Returns the command-line overrides that set fields of a stage."""
    return [f"stages.{stage}.{name}={value}" for name, value in values.items()]


def copy_without(run_dir: Path, copy: Path, *stages: str) -> Path:
    """Copies a run without some stages, and returns ``copy``.

    Files keep their modification times, so the launcher does not hash them again.
    """
    shutil.copytree(run_dir, copy)
    for stage in stages:
        shutil.rmtree(copy / stage)
    return copy


def manifest_of(run_dir: Path, stage: str) -> Manifest:
    """Returns the manifest of a complete stage."""
    manifest = read_manifest(run_dir / stage)
    assert manifest is not None
    return manifest


def make_artifact_folder(run_dir: Path, stage: str) -> Path:
    """Makes the folder ``work/artifact`` of a stage, to which the stage writes its artifact."""
    artifact = run_dir / stage / "work" / ARTIFACT
    artifact.mkdir(parents=True)
    return artifact
