"""Builds an inference engine from a model, and compares the engine with the model.

Reads a Hugging Face folder or a NeMo checkpoint, and held-out text if configured. Writes the
engine. ``backend=openvino`` builds on any CPU. ``tensorrt_llm`` builds a TensorRT engine, and
``tensorrt_llm_pytorch`` prepares the checkpoint for TensorRT-LLM's PyTorch backend. Both need a GPU
and NVIDIA's image, and are not compared, because TensorRT-LLM does not return logits.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from recipes.core.files import folder_bytes
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.core.versions import OPENVINO_LIBRARIES
from recipes.engines.backends import BUILDERS, engine_problems, model_folder, require_backend
from recipes.engines.results import EngineResult
from recipes.engines.settings import BuildEngineConfig
from recipes.planning.chain import Chain
from recipes.planning.inference_cost import InferenceCost, engine_build_cost
from recipes.stages.contract import Stage


def inference_cost(cfg: BuildEngineConfig, chain: Chain) -> InferenceCost | None:
    """Estimates the cost of building a TensorRT engine; ``None`` for the other backends."""
    if cfg.backend != "tensorrt_llm":
        return None
    shape = chain.shape_of(cfg.inputs.get("checkpoint"))
    return engine_build_cost(shape, cfg.storage, cfg.tensor_parallel_size)


def run(cfg: BuildEngineConfig, inputs: Inputs, out: Path) -> Outcome:
    """Builds the engine, and compares an OpenVINO engine with the model."""
    require_backend(cfg.backend)
    source, log = inputs["checkpoint"], metrics_log(out)
    # The three steps: convert a NeMo checkpoint if necessary, build, compare.
    log.progress("engine", 0, 3)
    folder = model_folder(source, out.parent / "source")
    log.progress("engine", 1, 3)
    start = time.monotonic()
    BUILDERS[cfg.backend](cfg, folder, out)
    build_seconds = time.monotonic() - start
    log.progress("engine", 2, 3)
    comparison: dict[str, Any] = {}  # the other fields of ``EngineResult``
    if cfg.backend == "openvino":
        from recipes.engines.checks import compare_engine

        comparison = vars(compare_engine(cfg, folder, out, inputs.get("data"), log))
    log.progress("engine", 3, 3)
    result = EngineResult(
        backend=cfg.backend,
        precision=cfg.precision,
        build_seconds=round(build_seconds, 3),
        bytes=folder_bytes(out),
        **comparison,
    )
    return Outcome.of(result, source.manifest)


STAGE = Stage(
    config=BuildEngineConfig,
    kind="engine",
    run=run,
    check=engine_problems,
    inference_cost=inference_cost,
    single_rank_reason="the builder starts its own processes",
    libraries=OPENVINO_LIBRARIES,
    inputs={"checkpoint": ("checkpoint_hf", "checkpoint_nemo")},
    optional_inputs={"data": ("dataset",)},
    # TensorRT-LLM starts its own ranks. For its PyTorch backend, the stage only copies files.
    devices=lambda config, chain: (
        config.tensor_parallel_size if config.backend == "tensorrt_llm" else 1
    ),
    needs_gpu=lambda config, chain: config.backend != "openvino",
    needs_tensorrt_llm=lambda config, chain: config.backend != "openvino",
    # The engine, a temporary copy of it, and the Hugging Face folder of its model. Each is at most
    # as large as the teacher in float32.
    disk_bytes=lambda config, chain: 3 * 4 * chain.teacher.parameters(),
    check_machine=lambda config: require_backend(config.backend),
)
