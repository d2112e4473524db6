"""A rehearsal's job on this machine's device: ``measured.py JOB OUT`` (JSON files).

As in a rehearsal, there are no checkpoints. Weights are random here.
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


def load_teacher(original: Any) -> Any:
    """Gives the teacher random weights, since its memory is not initialised."""

    def load(*args: Any) -> torch.nn.Module:
        core: torch.nn.Module = original(*args)
        for weight in core.parameters():
            weight.data.normal_(0, 0.02)
        return core

    return load


def main(job: RankJob) -> dict[str, Any]:
    """Trains, and returns peak memory and speed."""
    os.environ.update(environment(job))
    checkpoints.install()
    setattr(model, "_load_teacher", load_teacher(model._load_teacher))
    setattr(model, "require_better_than_chance", lambda *args: None)
    # Main weights would be read from a float32 checkpoint, which does not exist.
    trainer = importlib.import_module("recipes.distillation.trainer")
    setattr(trainer, "load_tensors_metadata", lambda weights: {})
    stage = importlib.import_module(f"recipes.stages.{job.stage}").STAGE
    merged = OmegaConf.merge(OmegaConf.structured(stage.config), job.config)
    steps: list[Any] = []

    def after_step(*args: Any) -> None:
        if not steps and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # the next step is like all that follow
        steps.append(args)

    register_optimizer_step_post_hook(after_step)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / job.name / WORK / ARTIFACT
        out.mkdir(parents=True)
        stage.run(OmegaConf.to_object(merged), materials.inputs(job, Path(temporary)), out)
        logged = steps_of(out.parent.parent / METRICS, job.name)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_bytes": peak, "tokens_per_second": [step["tokens_per_second"] for step in logged]}


if __name__ == "__main__":
    file, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(main(TypeAdapter(RankJob).validate_json(file.read_bytes()))))
