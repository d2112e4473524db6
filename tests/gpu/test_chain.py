"""Runs stages of the small model on the GPU, and compares the results with the CPU's."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from recipes.core.manifest import ARTIFACT, WORK
from recipes.core.metrics import METRICS
from recipes.core.stage import DEADLINE
from recipes.distillation.training import CHECKPOINTS, complete_checkpoints
from recipes.engines.results import QuantizationResult
from recipes.evaluation.results import EvaluationResult
from recipes.pruning.results import ScoreResult
from recipes.search.results import CANDIDATES_FILE
from tests.gpu.small import (
    DISTILL,
    PRECISIONS,
    STEPS,
    Small,
    largest_difference,
    on_gpu,
    record,
    step_records,
    without_gpu,
)
from tests.support.launcher import run_and_kill, run_recipe
from tests.support.runs import copy_without, manifest_of

LOSS_TOLERANCE = {"32": 1e-3, "bf16-mixed": 2e-2}
"""Relative tolerance by precision for the losses of the GPU, compared with those of the CPU."""
RESUME_TOLERANCE = 1e-3
"""Relative tolerance for the losses of a resumed and an uninterrupted run on the GPU. The GPU may
add numbers in a different order each time."""
ONLY_DISTILL = "only=[distill]"
PRECISION = "stages.distill.precision="
"""Override of the precision, without its value."""
SEARCH = (
    "only=[import_hf,prepare_data,enumerate_shapes,score,rank_candidates]",
    "stages.rank_candidates.precision=32",
)
HALVING = (
    "only=[successive_halving]",
    "stages.rank_candidates.precision=32",
    "stages.successive_halving.num_candidates=3",
    "stages.successive_halving.num_samples=4",
    # 24 steps of 8 * 64 tokens: 4 for each of 3 candidates, then 6 for each of the best 2.
    "stages.successive_halving.max_tokens=12288",
    *(
        f"stages.successive_halving.distill.{setting}"
        for setting in ("global_batch_size=8", "micro_batch_size=4", "limit_val_batches=1")
    ),
)
CACHED = (
    "teacher=cached",
    "only=[cache_logits,distill]",
    "stages.cache_logits.top_k=280",  # nearly the whole vocabulary of 294
    f"stages.cache_logits.num_sequences={DISTILL['global_batch_size'] * STEPS}",
)
HIDDEN = (ONLY_DISTILL, "stages.distill.hidden_weight=1", "stages.distill.loss_balancer=dynamic")
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "recompute selective": (
        1,
        ["recompute_granularity=selective", "recompute_modules=[core_attn,mlp]"],
    ),
    "recompute full": (1, ["recompute_granularity=full"]),
    "CP=2": (2, ["context_parallel_size=2"]),
    "CP=2, recompute full": (2, ["context_parallel_size=2", "recompute_granularity=full"]),
}
"""By name of the layout: its number of GPUs, and its settings of ``distill``."""
ENGINE_SIZES = (
    "stages.build_engine.max_seq_len=256",
    "stages.build_engine.max_input_len=128",
    "stages.measure_speed.prompt_tokens=[64]",
    "stages.measure_speed.new_tokens=32",
)
"""Sizes that the plan accepts for an engine of the small model. No test here builds the engine."""


def gpu_run_dir(small: Small, precision: str) -> Path:
    """Returns the directory of the GPU run that ``test_losses_match_the_cpu`` makes."""
    return small.folder / f"gpu-{precision}"


def read_candidates(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    """Returns the candidates that a stage of a search lists in its artifact."""
    candidates: list[dict[str, Any]] = json.loads(
        (run_dir / stage / ARTIFACT / CANDIDATES_FILE).read_text()
    )
    return candidates


def test_cpu_reference_learns(small: Small) -> None:
    for precision in PRECISIONS:
        records = step_records(small.reference_dir(precision))
        assert len(records) == STEPS
        assert records[-1]["kd"] < 0.8 * records[0]["kd"]


def test_importance_and_ranking_match_the_cpu(small: Small, results: Path) -> None:
    cpu, gpu = small.folder / "search-cpu", small.folder / "search-gpu"
    shutil.rmtree(gpu, ignore_errors=True)
    with without_gpu():
        small.run(cpu, *SEARCH, recipe="llama_search")
    copy_without(cpu, gpu, "score", "rank_candidates")
    small.run(gpu, *SEARCH, recipe="llama_search")
    expected, scores = (manifest_of(run, "score").result(ScoreResult) for run in (cpu, gpu))
    assert scores.teacher_loss == pytest.approx(expected.teacher_loss, rel=1e-3)
    for method, layers in expected.layer_importance.items():
        assert scores.layer_importance[method] == pytest.approx(layers, rel=2e-2, abs=1e-4), method
    # Each run's KL divergence from the teacher, by name of the candidate.
    expected_kl, kl = (
        {
            candidate["name"]: candidate["kl_to_teacher"]
            for candidate in read_candidates(run, "rank_candidates")
        }
        for run in (cpu, gpu)
    )
    assert kl == pytest.approx(expected_kl, rel=2e-2)
    record(results, "scores", cpu=expected_kl, gpu=kl)


def test_search_trains_on_the_gpu_on_which_it_measures(small: Small, results: Path) -> None:
    """A child process trains on the same GPU after the search has measured candidates there.

    Continues the run ``search-gpu`` of ``test_importance_and_ranking_match_the_cpu``.
    """
    run_dir = small.folder / "search-rounds"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(small.folder / "search-gpu", run_dir)
    small.run(run_dir, *HALVING, recipe="llama_search")
    candidates = read_candidates(run_dir, "successive_halving")
    record(results, "search", candidates=candidates)
    # Candidates were trained in no round (0 tokens), in one round, or in two.
    training_tokens = {candidate["tokens"] for candidate in candidates} - {0}
    assert len(training_tokens) == 2
    assert sum(candidate["chosen"] for candidate in candidates) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_match_the_cpu(precision: str, small: Small, results: Path) -> None:
    """Also stores the profiler's trace of the training among the results.

    CPU and GPU start with equal weights also with bf16-mixed, because the optimizer reads its
    main weights from the float32 checkpoint.
    """
    run_dir = small.copy_reference(gpu_run_dir(small, precision).name, precision, "distill")
    small.run(run_dir, ONLY_DISTILL, PRECISION + precision, "stages.distill.profile_steps=[10,12]")
    cpu_run_dir = small.reference_dir(precision)
    differences = {
        metric: largest_difference(cpu_run_dir, run_dir, metric)
        for metric in ("loss", "kd", "lm", "grad_norm")
    }
    [trace] = (run_dir / "distill" / "profile").iterdir()
    trace.replace(results / f"training-{precision}-{trace.name}")
    speed = [step["tokens_per_second"] for step in step_records(run_dir)]
    record(results, f"training-{precision}", differences=differences, tokens_per_second=speed)
    assert differences["loss"] < LOSS_TOLERANCE[precision]
    assert differences["kd"] < 2 * LOSS_TOLERANCE[precision]


def test_killed_training_resumes(small: Small) -> None:
    """A checkpoint every 2 steps slows training down, so the kill comes before training ends."""
    run_dir = small.copy_reference("killed", "32", "distill")
    overrides = ONLY_DISTILL, PRECISION + "32", "stages.distill.checkpoint_interval=2"
    stage_dir = run_dir / "distill"
    run_and_kill(
        *small.overrides(run_dir, *overrides),
        cwd=small.folder,
        metrics=stage_dir / METRICS,
        records=3,
        ready=lambda: complete_checkpoints(stage_dir / WORK / CHECKPOINTS),
    )
    assert "resume" in small.run(run_dir, *overrides)
    assert largest_difference(gpu_run_dir(small, "32"), run_dir) < RESUME_TOLERANCE


def test_training_stopped_at_its_deadline_resumes(small: Small) -> None:
    """The deadline is the time of the start, so training stops after its first step."""
    run_dir = small.copy_reference("stopped", "32", "distill")
    overrides = small.overrides(run_dir, ONLY_DISTILL, PRECISION + "32")
    with mock.patch.dict(os.environ, {DEADLINE: str(time.time())}):
        stopped = run_recipe(*overrides, cwd=small.folder)
    assert stopped.code != 0
    assert "stopped at the deadline; step 1 of" in stopped.output
    assert "resume" in small.run(run_dir, ONLY_DISTILL, PRECISION + "32")
    assert largest_difference(gpu_run_dir(small, "32"), run_dir) < RESUME_TOLERANCE


def test_cached_teacher_gives_the_losses_of_a_live_teacher(small: Small, results: Path) -> None:
    run_dir = small.copy_reference("cached", "32", "distill")
    small.run(run_dir, *CACHED, PRECISION + "32")
    difference = largest_difference(small.reference_dir("32"), run_dir, "kd")
    record(results, "cached", difference=difference)
    assert difference < 2e-2


def test_hidden_states_with_a_projection_match_the_cpu(small: Small, results: Path) -> None:
    """The student is narrower than the teacher, so training also learns a projection."""
    cpu, gpu = (
        small.copy_reference(f"hidden-{device}", "32", "distill") for device in ("cpu", "gpu")
    )
    with without_gpu():
        small.run(cpu, *HIDDEN, PRECISION + "32")
    small.run(gpu, *HIDDEN, PRECISION + "32")
    differences = {term: largest_difference(cpu, gpu, term) for term in ("loss", "kd", "hidden")}
    record(results, "hidden", differences=differences)
    assert differences["loss"] < 1e-2
    assert differences["hidden"] < 2e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_has_the_losses_of_the_cpu(layout: str, small: Small, results: Path) -> None:
    devices, distill_settings = LAYOUTS[layout]
    if devices > 1:
        pytest.importorskip("transformer_engine")  # context parallelism (CP) needs it
        if not on_gpu() or torch.cuda.device_count() < devices:
            pytest.skip(f"needs {devices} GPUs")
    name = f"layout-{list(LAYOUTS).index(layout)}"
    run_dir = small.copy_reference(name, "bf16-mixed", "distill")
    distill_settings = [f"resources.devices={devices}", *distill_settings]
    overrides = (f"stages.distill.{setting}" for setting in distill_settings)
    small.run(run_dir, ONLY_DISTILL, PRECISION + "bf16-mixed", *overrides)
    difference = largest_difference(small.reference_dir("bf16-mixed"), run_dir)
    record(results, name, layout=layout, difference=difference)
    assert difference < 2e-2


def test_a_distilled_model_is_evaluated_exported_and_quantized(small: Small, results: Path) -> None:
    run_dir = small.folder / "formats"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(gpu_run_dir(small, "bf16-mixed"), run_dir)
    small.run(
        run_dir,
        "only=[evaluate,export_hf,quantize]",
        # The copied run distilled with these two settings.
        PRECISION + "bf16-mixed",
        "stages.distill.profile_steps=[10,12]",
        "stages.evaluate.precision=bf16-mixed",
        *ENGINE_SIZES,
        engine="tensorrt_llm_quantized",
    )
    quality = manifest_of(run_dir, "evaluate").result(EvaluationResult)
    quantized = manifest_of(run_dir, "quantize").result(QuantizationResult)
    # The student is not compared with the tiny teacher: the teacher knows little more than word
    # frequencies, which the student learns equally well.
    assert quality.distilled.perplexity < quality.pruned.perplexity
    assert quality.distilled.kl_to_teacher < quality.pruned.kl_to_teacher
    assert quantized.quant_algo == "FP8"
    assert quantized.quality.quantized.kl_to_teacher < 0.1
    source_perplexity = quantized.quality.source.perplexity  # of the model before quantization
    assert source_perplexity == pytest.approx(quality.distilled.perplexity, rel=2e-2)
    perplexities = {role: model.perplexity for role, model in quality.models().items()}
    record(results, "formats", **perplexities, fp8=quantized.quality.quantized.perplexity)
