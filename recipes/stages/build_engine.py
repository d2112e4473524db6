"""A model to an engine that runs fast where it is deployed, with proof of what it still says.

``backend=openvino`` builds on any CPU. ``tensorrt_llm`` builds a TensorRT engine, and
``tensorrt_llm_pytorch`` prepares the same checkpoint for TensorRT-LLM's PyTorch backend; both need
a GPU and NVIDIA's image.
"""

from __future__ import annotations

import time
from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.engines.backends import BUILDERS, engine_problems, model_folder, require_backend
from recipes.engines.results import EngineResult
from recipes.engines.settings import BuildEngineConfig
from recipes.stages.contract import Stage


def run(cfg: BuildEngineConfig, inputs: Inputs, out: Path) -> Outcome:
    """Builds, compares with the model, and records what was built."""
    require_backend(cfg.backend)
    source, log = inputs["checkpoint"], metrics_log(out)
    log.progress("engine", 0, 3)
    folder = model_folder(source, out.parent / "source")
    log.progress("engine", 1, 3)
    began = time.monotonic()
    BUILDERS[cfg.backend](cfg, folder, out)
    seconds = time.monotonic() - began
    log.progress("engine", 2, 3)
    found = None
    if cfg.backend == "openvino":  # TensorRT-LLM's logits cannot be read
        from recipes.engines.checks import compare_engine

        found = compare_engine(cfg, folder, out, inputs.get("data"), log)
    log.progress("engine", 3, 3)
    return Outcome(
        EngineResult(
            backend=cfg.backend,
            precision=cfg.precision,
            group_size=cfg.scale_group,
            build_seconds=round(seconds, 3),
            bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
            **(vars(found) if found else {}),
        ),
        architecture=source.manifest.architecture,
        parameters=source.manifest.parameters,
        tokenizer_sha256=source.manifest.tokenizer_sha256,
    )


STAGE = Stage(
    config=BuildEngineConfig,
    kind="engine",
    run=run,
    check=engine_problems,
    one_rank="the builder starts what it needs by itself",
    inputs={"checkpoint": ("checkpoint_hf", "checkpoint_nemo")},
    optional_inputs={"data": ("dataset",)},
    needs_gpu=lambda config, chain: config.backend != "openvino",
    # The engine, and beside it a NeMo checkpoint's weights while they are converted.
    disk_bytes=lambda config, chain: 2 * 4 * chain.teacher.parameters(),
    require_here=lambda config: require_backend(config.backend),
)

if __name__ == "__main__":
    STAGE.main()
