"""Compares planned, rehearsed and measured peak memory of a training of Llama 3.1 8B.

A rehearsal runs a stage on fake tensors and tracks their memory. The models have only a few layers.
"""

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
"""Numbers of the teacher's layers that are tested. The student has half as many layers."""
ONE_GPU = (
    "stages.distill.tensor_model_parallel_size=1",
    "stages.distill.sequence_parallel=false",
    "stages.distill.resources={nodes: 1, devices: 1}",
)
STEPS = 6
"""Number of measured training steps."""


def distill_job(layers: int) -> tuple[Any, RankJob]:
    """Returns a recipe's ``Chain``, and the job that rehearses its distillation.

    Args:
        layers: Number of the teacher's layers.
    """
    recipe = "llama3_1_8b_depth" if on_gpu() else "llama_depth_prune"
    overrides = ONE_GPU if on_gpu() else ()
    return job_with_layers(recipe, "distill", 0, overrides, layers)


def run_module(module: str, job: Any, *arguments: str, folder: Path) -> str:
    """Runs ``python -m MODULE FILE ARGUMENT...`` in a folder; returns its output.

    Args:
        module: Name of the module.
        job: A job or a list of jobs, which is written to the file as JSON.
        arguments: Further arguments of the module.
        folder: Working directory, and folder of the file.
    """
    file = folder / "jobs.json"
    file.write_text(json.dumps(job))
    process = subprocess.run(
        [sys.executable, "-m", module, str(file), *arguments],
        capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def rehearsed_peaks(results: Path, tmp_path: Path) -> dict[int, float]:
    """Maps each of ``LAYERS`` to the rehearsed peak bytes.

    An earlier test may have stored the peaks in ``results``. Otherwise the rehearsals run now.
    """
    file = results / "rehearsal.json"
    if not file.exists():
        jobs = [asdict(distill_job(layers)[1]) for layers in LAYERS]
        # "1" is the number of processes.
        lines = run_module("recipes.rehearsal.worker", jobs, "1", folder=tmp_path).splitlines()
        rehearsals = [TypeAdapter(RehearsalResult).validate_json(line) for line in lines]
        for rehearsal in rehearsals:
            assert rehearsal.error is None, rehearsal.error
        peaks = {
            str(layers): rehearsal.peak
            for layers, rehearsal in zip(LAYERS, rehearsals, strict=True)
        }
        record(results, "rehearsal", **peaks)
    peaks = json.loads(file.read_text())  # by number of layers, then by type of tensor
    return {layers: sum(peaks[str(layers)].values()) for layers in LAYERS}


def test_rehearsed_memory_matches_the_plan(results: Path, tmp_path: Path) -> None:
    for layers, peak in rehearsed_peaks(results, tmp_path).items():
        chain, job = distill_job(layers)
        plan = planned_memory(job, chain)
        planned_peak = sum(getattr(plan, kind) for kind in KINDS)  # of all types of tensors
        assert peak == pytest.approx(planned_peak, rel=0.1)


def test_measured_memory_matches_the_rehearsal(results: Path, tmp_path: Path) -> None:
    peaks = rehearsed_peaks(results, tmp_path)
    comparison: dict[str, dict[str, Any]] = {}  # by number of layers
    result_file = tmp_path / "measured.json"
    for layers in LAYERS:
        chain, job = distill_job(layers)
        changes = {
            **dict.fromkeys(("max_steps", "val_check_interval", "checkpoint_interval"), STEPS),
            # All tokens are 0, the end of a document. Masking document ends would mask all tokens.
            "mask_document_ends": False,
        }
        job = replace(job, config={**job.config, **changes})
        run_module("tests.gpu.measured", asdict(job), str(result_file), folder=tmp_path)
        measured = json.loads(result_file.read_text())
        config = replace(chain.stages["distill"], global_batch_size=job.config["global_batch_size"])
        planned_step = step_time(distill.workload(config, chain), chain.hardware)
        tokens = config.global_batch_size * config.seq_length
        comparison[str(layers)] = {
            "rehearsed_bytes": peaks[layers],
            "planned_seconds": planned_step.total,
            "seconds": [tokens / speed for speed in measured["tokens_per_second"]],
            **measured,
        }
    record(results, "memory", **comparison)
    if on_gpu():
        for layers in LAYERS:
            assert comparison[str(layers)]["peak_bytes"] == pytest.approx(peaks[layers], rel=0.1)
