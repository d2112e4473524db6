"""Planned, rehearsed and measured peak memory agree for layers of Llama 3.1 8B at full length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from launch.rehearse import KINDS, planned_memory
from recipes.core.files import REPO_ROOT
from recipes.planning.training_cost import step_time
from recipes.rehearsal.job import RankJob, RehearsalResult
from recipes.stages import distill
from tests.gpu.small import on_gpu, record
from tests.support.rehearsals import job_with_layers

LAYERS = (4, 8)
ONE_GPU = (
    "stages.distill.tensor_model_parallel_size=1",
    "stages.distill.sequence_parallel=false",
    "stages.distill.resources={nodes: 1, devices: 1}",
)
STEPS = 6


def job_of(layers: int) -> tuple[Any, RankJob]:
    """Returns a run's stages and its distillation; the student has half of the layers."""
    recipe = "llama3_1_8b_depth" if on_gpu() else "llama_depth_prune"
    return job_with_layers(recipe, "distill", 0, ONE_GPU if on_gpu() else (), layers)


def start(module: str, job: Any, *arguments: str, folder: Path) -> str:
    """Runs a module on a job; returns its output."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-m", module, str(file), *arguments],
        capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rehearsed(results: Path, tmp_path: Path) -> dict[int, float]:
    """Returns the peak bytes by number of layers; later calls read the stored rehearsal."""
    file = results / "rehearsal.json"
    if not file.exists():
        jobs = [asdict(job_of(layers)[1]) for layers in LAYERS]
        lines = start("recipes.rehearsal.worker", jobs, "1", folder=tmp_path).splitlines()
        rehearsals = [TypeAdapter(RehearsalResult).validate_json(line) for line in lines]
        for layers, one in zip(LAYERS, rehearsals, strict=True):
            assert one.error is None, one.error
        record(
            results,
            "rehearsal",
            **{f"{n}": one.peak for n, one in zip(LAYERS, rehearsals, strict=True)},
        )
    peaks = json.loads(file.read_text())
    return {layers: sum(peaks[f"{layers}"].values()) for layers in LAYERS}


def test_rehearsed_memory_matches_the_plan(results: Path, tmp_path: Path) -> None:
    for layers, peak in rehearsed(results, tmp_path).items():
        chain, job = job_of(layers)
        plan = planned_memory(job, chain)
        assert peak == pytest.approx(sum(getattr(plan, kind) for kind in KINDS), rel=0.1)


def test_measured_memory_matches_the_rehearsal(results: Path, tmp_path: Path) -> None:
    peaks, values = rehearsed(results, tmp_path), {}
    for layers in LAYERS:
        chain, job = job_of(layers)
        # All tokens are 0, the end of a document. Masking document ends would mask all of them.
        longer = {"max_steps": STEPS, "val_check_interval": STEPS, "checkpoint_interval": STEPS,
                  "mask_document_ends": False}  # fmt: skip
        job = replace(job, config={**job.config, **longer})
        start("tests.gpu.measured", asdict(job), str(tmp_path / "found.json"), folder=tmp_path)
        measured = json.loads((tmp_path / "found.json").read_text())
        config = replace(chain.stages["distill"], global_batch_size=job.config["global_batch_size"])
        step = step_time(distill.workload(config, chain), chain.hardware)
        tokens = config.global_batch_size * config.seq_length
        values[f"{layers}"] = {
            "rehearsed_bytes": peaks[layers],
            "planned_seconds": step.total,
            "seconds": [tokens / speed for speed in measured["tokens_per_second"]],
            **measured,
        }
    record(results, "memory", **values)
    if on_gpu():
        for layers in LAYERS:
            assert values[f"{layers}"]["peak_bytes"] == pytest.approx(peaks[layers], rel=0.1)
