"""Runs a rehearsed training job on real tensors; measures its memory and speed.

A rehearsal runs the same ``RankJob`` on fake tensors. Here too, no checkpoint is read; the weights
are random.

Usage: ``python -m tests.gpu.measured JOB RESULT``. Reads the job from the JSON file ``JOB``, and
writes what ``main`` returns to the JSON file ``RESULT``.
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
    """Wraps ``load``, which returns a model with uninitialized weights, and makes them random."""

    def load_and_randomize(*args: Any) -> torch.nn.Module:
        module: torch.nn.Module = load(*args)
        for weight in module.parameters():
            weight.data.normal_(0, 0.02)
        return module

    return load_and_randomize


def main(job: RankJob) -> dict[str, Any]:
    """Runs the job.

    Returns:
        ``peak_bytes``: peak memory that PyTorch allocated on the GPU after the first step; ``None``
        without a GPU. ``tokens_per_second``: the speed of each step.
    """
    os.environ.update(environment(job))
    checkpoints.install()  # training neither reads nor writes weights
    setattr(model, "_load_teacher", with_random_weights(model._load_teacher))
    setattr(model, "require_better_than_chance", lambda *args: None)  # random weights are at chance
    # The checkpoint has no weights. Without metadata, the trainer reads no float32 main weights.
    trainer = importlib.import_module("recipes.distillation.trainer")
    setattr(trainer, "load_tensors_metadata", lambda weights: {})
    stage = importlib.import_module(f"recipes.stages.{job.stage}").STAGE
    config = OmegaConf.merge(OmegaConf.structured(stage.config), job.config)
    steps_done = 0

    def after_step(*args: Any) -> None:
        nonlocal steps_done
        if steps_done == 0 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # so that setup and the first step do not count
        steps_done += 1

    register_optimizer_step_post_hook(after_step)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / job.name / WORK / ARTIFACT
        out.mkdir(parents=True)
        stage.run(OmegaConf.to_object(config), materials.inputs(job, Path(temporary)), out)
        stage_dir = out.parent.parent
        records = steps_of(stage_dir / METRICS, job.name)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_bytes": peak, "tokens_per_second": [r["tokens_per_second"] for r in records]}


if __name__ == "__main__":
    job_file, result_file = map(Path, sys.argv[1:])
    job = TypeAdapter(RankJob).validate_json(job_file.read_bytes())
    result_file.write_text(json.dumps(main(job)))
