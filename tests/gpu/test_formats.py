"""What becomes of a distilled model: evaluated in bfloat16, exported, quantised to FP8."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from recipes.engines.results import QuantizationResult
from recipes.evaluation.results import EvaluationResult
from tests.gpu.small import Small, record
from tests.support.runs import manifest_of

SHORT = (
    "stages.build_engine.max_seq_len=256",
    "stages.build_engine.max_input_len=128",
    "stages.measure_speed.prompt_tokens=[64]",
    "stages.measure_speed.new_tokens=32",
)
"""As the model is; engines are planned, and not built."""


def test_a_distilled_model_is_evaluated_exported_and_quantised(small: Small, results: Path) -> None:
    run_dir = small.folder / "formats"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(small.folder / "gpu-bf16-mixed", run_dir)
    small.start(
        run_dir,
        "only=[evaluate,export_hf,quantize]",
        "stages.distill.precision=bf16-mixed",
        "stages.distill.profile_steps=[10,12]",
        "stages.evaluate.precision=bf16-mixed",
        *SHORT,
        engine="tensorrt_llm_quantized",
    )
    quality = manifest_of(run_dir, "evaluate").result(EvaluationResult)
    quantised = manifest_of(run_dir, "quantize").result(QuantizationResult)
    # The tiny teacher knows hardly more than how often a word is, which its student learns as well.
    assert quality.distilled.perplexity < quality.pruned.perplexity
    assert quality.distilled.kl_to_teacher < quality.pruned.kl_to_teacher
    assert quantised.quant_algo == "FP8"
    assert quantised.quality.quantized.kl_to_teacher < 0.1
    source = quantised.quality.source.perplexity
    assert source == pytest.approx(quality.distilled.perplexity, rel=2e-2)
    record(
        results,
        "formats",
        teacher=quality.teacher.perplexity,
        pruned=quality.pruned.perplexity,
        distilled=quality.distilled.perplexity,
        fp8=quantised.quality.quantized.perplexity,
    )
