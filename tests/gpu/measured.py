"""Runs a training that a rehearsal runs on fake tensors; measures its real memory and speed.

Usage: ``measured.py JOB RESULT``, with two JSON files. Weights are random, not from a checkpoint.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from torch.optim.optimizer import register_optimizer_step_post_hook

from recipes.core.manifest import ARTIFACT, WORK
from recipes.core.metrics import METRICS, steps_of
from recipes.distillation import model
from recipes.rehearsal import checkpoints, materials
from recipes.rehearsal.job import RankJob
from recipes.rehearsal.rank import environment


def with_random_weights(load: Any) -> Any:
    """Wraps ``load``, which returns a model without initial weights; makes the weights random."""

    def load_and_initialise(*args: Any) -> torch.nn.Module:
        core: torch.nn.Module = load(*args)
        for weight in core.parameters():
            weight.data.normal_(0, 0.02)
        return core

    return load_and_initialise


def main(job: RankJob) -> dict[str, Any]:
    """Trains, and returns peak memory and speed."""
    os.environ.update(environment(job))
    checkpoints.install()
    setattr(model, "_load_teacher", with_random_weights(model._load_teacher))
    setattr(model, "require_better_than_chance", lambda *args: None)  # random weights are at chance
    # Without metadata the trainer reads no main weights from the checkpoint, which has no weights.
    trainer = importlib.import_module("recipes.distillation.trainer")
    setattr(trainer, "load_tensors_metadata", lambda weights: {})
    stage = importlib.import_module(f"recipes.stages.{job.stage}").STAGE
    config = OmegaConf.merge(OmegaConf.structured(stage.config), job.config)
    steps: list[Any] = []

    def after_step(*args: Any) -> None:
        if not steps and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # ignores setup and the first step
        steps.append(args)

    register_optimizer_step_post_hook(after_step)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / job.name / WORK / ARTIFACT
        out.mkdir(parents=True)
        stage.run(OmegaConf.to_object(config), materials.inputs(job, Path(temporary)), out)
        records = steps_of(out.parent.parent / METRICS, job.name)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_bytes": peak, "tokens_per_second": [r["tokens_per_second"] for r in records]}


if __name__ == "__main__":
    job_file, result_file = map(Path, sys.argv[1:])
    job = TypeAdapter(RankJob).validate_json(job_file.read_bytes())
    result_file.write_text(json.dumps(main(job)))
