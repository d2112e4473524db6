"""A model to an engine that runs fast where it is deployed, with proof of what it still says.

``backend=openvino`` builds on any CPU. ``tensorrt_llm`` builds a TensorRT engine, and
``tensorrt_llm_pytorch`` prepares the same checkpoint for TensorRT-LLM's PyTorch backend; both need
a GPU and NVIDIA's image.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes import engine_openvino, engine_tensorrt_llm
from recipes.errors import RecipeError
from recipes.manifest import Outcome
from recipes.metrics import MetricsLog
from recipes.preflight import Chain, Problem, one_rank_problems, window_problems
from recipes.stage import Input, Inputs, StageConfig, metrics_log, stage_main

KIND = "engine"
INPUTS = {"checkpoint": ("checkpoint_hf", "checkpoint_nemo")}
OPTIONAL_INPUTS = {"data": "dataset"}

PRECISIONS = {
    "openvino": engine_openvino.PRECISIONS,
    "tensorrt_llm": engine_tensorrt_llm.ENGINE_PRECISIONS,
    "tensorrt_llm_pytorch": engine_tensorrt_llm.PYTORCH_PRECISIONS,
}
KV_CACHE_DTYPES = {
    "openvino": engine_openvino.KV_CACHE_DTYPES,
    "tensorrt_llm": engine_tensorrt_llm.KV_CACHE_DTYPES,
    "tensorrt_llm_pytorch": engine_tensorrt_llm.KV_CACHE_DTYPES,
}


@dataclass
class Config(StageConfig):
    """Settings of ``build_engine``."""

    backend: str = "openvino"
    """``openvino``, ``tensorrt_llm`` or ``tensorrt_llm_pytorch``."""
    precision: str = "fp32"
    """Of weights. ``int8`` and ``int4`` are compressed here; ``fp8``, ``int8_sq`` and ``int4_awq``
    come from a checkpoint that ``quantize`` made."""
    group_size: int = 64
    """Weights that share a scale, for OpenVINO's ``int4``."""
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    max_batch_size: int = 8
    """This and the lengths below are TensorRT-LLM's; an engine of OpenVINO takes any."""
    max_input_len: int | None = None
    """Longest prompt; by default what ``max_seq_len`` leaves for one new token."""
    max_seq_len: int | None = None
    """Longest prompt with what is generated; by default all of the model's positions."""
    max_num_tokens: int = 8192
    """Tokens of all requests that one step works on."""
    seq_length: int = 256
    num_windows: int = 8
    """Held-out windows of ``seq_length`` tokens on which quality is measured."""


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds what would fail after the model was trained."""
    if cfg.backend not in PRECISIONS:
        yield Problem(
            "backend", f"backend={cfg.backend} is none", f"use one of: {', '.join(PRECISIONS)}"
        )
        return
    for name, choices in (("precision", PRECISIONS), ("kv_cache_dtype", KV_CACHE_DTYPES)):
        if (value := getattr(cfg, name)) not in choices[cfg.backend]:
            yield Problem(
                "precision",
                f"{name}={value} is none of {cfg.backend}'s",
                f"use one of: {', '.join(choices[cfg.backend])}",
            )
    yield from _length_problems(cfg, chain)
    yield from one_rank_problems(cfg, "the builder starts what it needs by itself")
    if cfg.backend == "openvino":
        yield from window_problems(cfg.seq_length, chain)
        yield from engine_openvino.problems(cfg)
    else:
        arch = chain.shape_of(chain.pruned_by(cfg))
        yield from engine_tensorrt_llm.problems(cfg, arch)


def _length_problems(cfg: Config, chain: Chain) -> Iterator[Problem]:
    sizes = ("group_size", "tensor_parallel_size", "max_batch_size", "max_num_tokens")
    small = [name for name in (*sizes, "num_windows") if getattr(cfg, name) < 1]
    if small:
        yield Problem("positive", f"{', '.join(small)} is not positive", "use 1 or more")
    limit = chain.teacher.max_position_embeddings
    longest = cfg.max_seq_len or limit
    if not 2 <= longest <= limit:
        yield Problem(
            "max-seq-len",
            f"max_seq_len={cfg.max_seq_len} is not between 2 and the model's {limit} positions",
            f"set it to at most {limit}",
        )
    if cfg.max_input_len is not None and not 1 <= cfg.max_input_len < longest:
        yield Problem(
            "max-input-len",
            f"max_input_len={cfg.max_input_len} leaves no room in max_seq_len={longest}",
            f"use 1 to {longest - 1}",
        )


def disk_bytes(cfg: Config, chain: Chain) -> int:
    """The engine, and beside it a NeMo checkpoint's weights while they are converted."""
    return 2 * 4 * chain.teacher.parameters()


def require_here(cfg: Config) -> None:
    """Raises ``RecipeError`` unless this machine can run the stage."""
    require_backend(cfg.backend)


def require_backend(backend: str) -> None:
    """Raises ``RecipeError`` unless this machine has what a backend needs."""
    if backend != "openvino":
        engine_tensorrt_llm.require(backend)
    elif importlib.util.find_spec("openvino_genai") is None:
        raise RecipeError(
            "backend=openvino needs openvino-genai, which is not installed.",
            "install this repository's dependencies again (make install), or set engine=none",
        )


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Builds, compares with the model, and records what was built."""
    require_here(cfg)
    source, log = inputs["checkpoint"], metrics_log(out)
    log.progress("engine", 0, 3)
    folder = model_folder(source, out.parent / "source")
    log.progress("engine", 1, 3)
    began = time.monotonic()
    BUILDERS[cfg.backend](cfg, folder, out)
    seconds = time.monotonic() - began
    log.progress("engine", 2, 3)
    found = _compare(cfg, folder, out, inputs.get("data"), log)
    log.progress("engine", 3, 3)
    return Outcome(
        metrics={
            "backend": cfg.backend,
            "precision": cfg.precision,
            "group_size": cfg.group_size if cfg.precision == "int4" else None,
            "build_seconds": round(seconds, 3),
            "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
            **found,
        },
        architecture=source.manifest.architecture,
        parameters=source.manifest.parameters,
        tokenizer_sha256=source.manifest.tokenizer_sha256,
    )


BUILDERS: dict[str, Callable[[Config, Path, Path], None]] = {
    "openvino": engine_openvino.build,
    "tensorrt_llm": engine_tensorrt_llm.build,
    "tensorrt_llm_pytorch": engine_tensorrt_llm.prepare_pytorch,
}


def _compare(
    cfg: Config, folder: Path, out: Path, data: Input | None, log: MetricsLog
) -> dict[str, Any]:
    """Compares where the engine's logits can be read, which is not so with TensorRT-LLM's."""
    if cfg.backend != "openvino":
        return {}
    from recipes.engine_checks import compare_engine

    return compare_engine(cfg, folder, out, data.artifact if data else None, log)


def model_folder(source: Input, scratch: Path) -> Path:
    """A checkpoint as a Hugging Face folder, converted into ``scratch`` if it is a NeMo one."""
    if source.manifest.kind == "checkpoint_hf":
        return source.artifact
    from nemo_convert import convert, nemo

    convert.to_hf(nemo.find_checkpoint(source.artifact), scratch)
    return scratch


if __name__ == "__main__":
    stage_main(run, Config, KIND)
