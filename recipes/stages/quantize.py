"""Quantizes the exported model with ModelOpt for TensorRT-LLM.

Reads a Hugging Face folder and calibration text. Writes ModelOpt's unified Hugging Face format,
which TensorRT-LLM, vLLM and SGLang read. OpenVINO engines do not need this stage: their weights are
compressed when the engine is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemo_convert.architecture import Architecture
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.engines.settings import QuantizeConfig
from recipes.engines.tensorrt_llm import FP8_REQUIREMENT, SIZE_MULTIPLES, matrix_sizes
from recipes.planning import rules
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.inference_cost import InferenceCost, quantization_cost
from recipes.planning.limits import fp8_problems
from recipes.planning.rules import Problem, first_problems
from recipes.stages.contract import Stage


def check(cfg: QuantizeConfig, chain: Chain) -> Iterator[Problem]:
    """Checks ``seq_length``, and the GPU and the matrix sizes that the format needs."""
    yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)
    if cfg.format == "fp8":
        yield from fp8_problems(chain.hardware, *FP8_REQUIREMENT)
    shapes = chain.shapes_of(cfg.inputs.get("checkpoint"))
    yield from first_problems(_size_problems(cfg, shape) for shape in shapes)


def _size_problems(cfg: QuantizeConfig, shape: Architecture) -> Iterator[Problem]:
    multiple = SIZE_MULTIPLES[cfg.format]
    for name, size, _ in matrix_sizes(shape, ranks=1):
        if size % multiple:
            yield Problem(
                rules.ALIGNMENT,
                f"{name}={size} must be a multiple of {multiple} for format={cfg.format}",
                f"prune to a multiple of {multiple}, or use another format",
            )


def inference_cost(cfg: QuantizeConfig, chain: Chain) -> InferenceCost:
    """Estimates the memory that the stage needs, but not the time."""
    student = chain.shape_of(cfg.inputs.get("checkpoint"))
    return quantization_cost(student, cfg.seq_length, chain.hardware)


def run(cfg: QuantizeConfig, inputs: Inputs, out: Path) -> Outcome:
    """Quantizes the model with calibration, and compares the result with the original model."""
    from recipes.engines.quantization import quantize_folder

    source = inputs["checkpoint"]
    result = quantize_folder(cfg, source.artifact, inputs["calibration"], out, metrics_log(out))
    return Outcome.of(result, source.manifest)


STAGE = Stage(
    config=QuantizeConfig,
    kind="checkpoint_hf",
    run=run,
    check=check,
    inference_cost=inference_cost,
    single_rank_reason="the model is not split over ranks",
    inputs={"checkpoint": ("checkpoint_hf",), "calibration": ("dataset",)},
    # Upper bound: a student as large as the teacher, with 2 bytes (bfloat16) per parameter.
    disk_bytes=lambda config, chain: 2 * chain.teacher.parameters(),
)
