"""Tests a recipe with a TensorRT-LLM engine on a machine without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from recipes.core.manifest import MANIFEST
from tests.chaos.chain import overrides
from tests.support.in_process import run_in_process


def test_a_missing_gpu_is_reported_before_anything_runs(
    odd_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there may be a GPU")
    run_dir = tmp_path / "run"
    command = overrides(odd_llama, text_file, run_dir, engine="tensorrt_llm")
    settings = [
        f"stages.{stage}.{setting}"
        for stage in ("build_engine", "build_teacher_engine")
        for setting in ("backend=tensorrt_llm_pytorch", "max_seq_len=256", "max_input_len=200")
    ]
    settings += ["stages.measure_speed.prompt_tokens=[64]", "stages.measure_speed.new_tokens=16"]
    settings += ["skip_rules=[head-size]"]  # TensorRT-LLM lacks the tiny model's head size of 10
    result = run_in_process(*command, *settings, cwd=tmp_path)
    assert result.code == 1
    assert "needs an NVIDIA GPU and TensorRT-LLM" in result.output
    assert "nvcr.io/nvidia/tensorrt-llm/release:" in result.output
    # No stage is complete.
    assert not run_dir.exists() or not list(run_dir.rglob(MANIFEST))
