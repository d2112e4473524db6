"""Runs of tiny models: what their command lines have in common, and copies of finished ones."""

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
"""Of a recipe that prunes, with ``tasks=null engine=null``, in their order."""
HEALING = [*STAGES[:5], "heal", *STAGES[5:]]
"""The same with ``heal=least_squares``."""


def tiny(model: Path, text_file: Path | str, run_dir: Path, seq_length: int = 64) -> list[str]:
    """Overrides of a recipe: this model, this text (or sources, with commas), there."""
    return [
        f"model.hf_path={model}",
        f"data.sources=[{text_file}]",
        "data.heldout_sources=[]",
        "data.text_field=text",
        f"data.seq_length={seq_length}",
        f"run_dir={run_dir}",
    ]


def settings(stage: str, **values: object) -> list[str]:
    """Overrides of a stage's fields."""
    return [f"stages.{stage}.{name}={value}" for name, value in values.items()]


def without(run_dir: Path, copy: Path, *stages: str) -> Path:
    """A copy of a run in which some stages have not run; times are kept, so hashes are trusted."""
    shutil.copytree(run_dir, copy)
    for stage in stages:
        shutil.rmtree(copy / stage)
    return copy


def manifest_of(run_dir: Path, stage: str) -> Manifest:
    """Manifest of a stage that must be complete."""
    manifest = read_manifest(run_dir / stage)
    assert manifest is not None
    return manifest


def stage_dir(run_dir: Path, name: str) -> Path:
    """Where a stage writes its artifact, as it finds it."""
    out = run_dir / name / "work" / ARTIFACT
    out.mkdir(parents=True)
    return out
