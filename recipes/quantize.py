"""Quantisation with ModelOpt, calibrated on the run's own calibration text, for TensorRT-LLM.

Written in ModelOpt's unified Hugging Face format, which TensorRT-LLM, vLLM and SGLang read.
OpenVINO compresses weights itself when it builds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recipes.engine_tensorrt_llm import ALIGNMENT, CALIBRATED
from recipes.manifest import Outcome
from recipes.preflight import Chain, Problem, one_rank_problems, window_problems
from recipes.stage import Inputs, StageConfig, metrics_log, stage_main

KIND = "checkpoint_hf"
INPUTS = {"checkpoint": "checkpoint_hf", "calibration": "dataset"}


@dataclass
class Config(StageConfig):
    """Settings of ``quantize``."""

    format: str = "fp8"
    """``fp8`` (weights and activations), ``int8_sq`` (SmoothQuant), ``int4_awq`` (weights)."""
    kv_cache_dtype: str = "auto"
    """``fp8`` also calibrates scales of the KV cache."""
    seq_length: int = 256
    num_windows: int = 128
    """Calibration windows of ``seq_length`` tokens; fewer if the part is shorter."""
    num_eval_windows: int = 8
    """Held-out windows on which quality is compared."""
    micro_batch_size: int = field(default=4, metadata={"resource": True})


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds formats that do not exist, and shapes that they do not fit."""
    if cfg.format not in CALIBRATED:
        yield Problem("format", f"format={cfg.format} is none", f"use {', '.join(CALIBRATED)}")
        return
    if cfg.kv_cache_dtype not in ("auto", "fp8"):
        yield Problem("kv-cache", f"kv_cache_dtype={cfg.kv_cache_dtype} is none", "use auto or fp8")
    sizes = (cfg.num_windows, cfg.num_eval_windows, cfg.micro_batch_size)
    if min(sizes) < 1:
        yield Problem("positive", "a number of windows is not positive", "use 1 or more")
    yield from window_problems(cfg.seq_length, chain)
    yield from one_rank_problems(cfg, "its model is not split over ranks")
    arch = chain.shape_of(chain.pruned_by(cfg))
    align = ALIGNMENT[cfg.format]
    for name in ("hidden_size", "ffn_hidden_size"):
        if getattr(arch, name) % align:
            yield Problem(
                "alignment",
                f"{name}={getattr(arch, name)} is not a multiple of {align}, which kernels for "
                f"{cfg.format} need",
                f"prune to a multiple of {align}, or use another format",
            )


def disk_bytes(cfg: Config, chain: Chain) -> int:
    """Size of the folder, the teacher's at most."""
    return 2 * chain.teacher.parameters()


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Calibrates, compares with the model, and writes the folder."""
    from recipes.modelopt_quantization import quantize_folder

    source = inputs["checkpoint"]
    metrics = quantize_folder(
        cfg, source.artifact, inputs["calibration"].artifact, out, metrics_log(out)
    )
    return Outcome(
        metrics=metrics,
        architecture=source.manifest.architecture,
        parameters=source.manifest.parameters,
        tokenizer_sha256=source.manifest.tokenizer_sha256,
    )


if __name__ == "__main__":
    stage_main(run, Config, KIND)
