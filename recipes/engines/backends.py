"""Selects the checks, requirements and builder of an engine's backend, without importing torch."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.manifest import Manifest, manifest_of
from recipes.core.stage import Input
from recipes.engines import openvino, tensorrt_llm
from recipes.engines.settings import CALIBRATED_FORMATS, BuildEngineConfig
from recipes.engines.timing import RequestShape
from recipes.planning import rules
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.limits import fp8_problems
from recipes.planning.rules import Problem

PRECISIONS = {
    "openvino": openvino.PRECISIONS,
    "tensorrt_llm": tensorrt_llm.ENGINE_PRECISIONS,
    "tensorrt_llm_pytorch": tensorrt_llm.PYTORCH_PRECISIONS,
}
KV_CACHE_DTYPES = {
    "openvino": openvino.KV_CACHE_DTYPES,
    "tensorrt_llm": tensorrt_llm.KV_CACHE_DTYPES,
    "tensorrt_llm_pytorch": tensorrt_llm.KV_CACHE_DTYPES,
}


def engine_problems(cfg: BuildEngineConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of settings that would make the build fail after hours of training."""
    for name, choices in (("precision", PRECISIONS), ("kv_cache_dtype", KV_CACHE_DTYPES)):
        if (value := getattr(cfg, name)) not in choices[cfg.backend]:
            supporting = [backend for backend in choices if value in choices[backend]]
            yield Problem(
                rules.FORMAT,
                f"backend={cfg.backend} does not support {name}={value}",
                f"use one of: {', '.join(choices[cfg.backend])}"
                + "".join(f", or {_switch(cfg.backend, b, value)}" for b in supporting),
            )
    yield from _length_problems(cfg, chain)
    if cfg.backend == "openvino":
        yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)
        yield from openvino.problems(cfg)
    else:
        if cfg.precision == "fp8":
            yield from fp8_problems(chain.hardware, *tensorrt_llm.FP8_REQUIREMENT)
        arch = chain.shape_of(cfg.inputs.get("checkpoint"))
        yield from tensorrt_llm.problems(
            cfg, arch, chain.stages.get(cfg.inputs.get("checkpoint", ""))
        )


def _switch(current: str, backend: str, value: str) -> str:
    """Returns the setting that changes the backend. A change from or to OpenVINO changes stages."""
    if "openvino" not in (current, backend):
        return f"backend={backend}"
    suffix = "_quantized" if value in CALIBRATED_FORMATS else ""
    engine = backend if backend == "openvino" else f"tensorrt_llm{suffix}"
    return f"engine={engine} (backend={backend})"


def _length_problems(cfg: BuildEngineConfig, chain: Chain) -> Iterator[Problem]:
    limit = chain.teacher.max_position_embeddings
    longest = cfg.max_seq_len or limit
    if longest > limit:
        yield Problem(
            rules.MAX_SEQ_LEN,
            f"max_seq_len={cfg.max_seq_len} is more than the model's {limit} positions",
            f"set it to at most {limit}",
        )
    if cfg.max_input_len is not None and cfg.max_input_len >= longest:
        yield Problem(
            rules.MAX_INPUT_LEN,
            f"max_input_len={cfg.max_input_len} leaves no room for new tokens in "
            f"max_seq_len={longest}",
            f"set max_input_len to at most {longest - 1}",
        )


def require_backend(backend: str) -> None:
    """Raises ``RecipeError`` unless this machine can run a backend."""
    if backend != "openvino":
        tensorrt_llm.require(backend)
    elif importlib.util.find_spec("openvino_genai") is None:
        raise RecipeError(
            "backend=openvino needs openvino-genai, which is not installed",
            "install this repository's dependencies again (make install), or set engine=null",
        )


def request_problems(
    shape: RequestShape, engine: BuildEngineConfig, name: str, smaller: str
) -> Iterator[Problem]:
    """Yields a problem for each limit of an engine that timed requests exceed.

    OpenVINO has no limits. If the prompts of a batch do not fit into one step, TensorRT-LLM
    computes them in several steps, and the measured decoding rate is too low.

    Args:
        shape: The largest batch of requests.
        engine: The engine's settings.
        name: The engine's name in messages.
        smaller: How to make the requests smaller.
    """
    needed = {
        "max_batch_size": shape.batch_size,
        "max_input_len": shape.prompt_tokens,
        "max_seq_len": shape.prompt_tokens + shape.new_tokens,
        "max_num_tokens": shape.batch_size * shape.prompt_tokens,
    }
    for limit, value in needed.items() if engine.backend != "openvino" else ():
        if (allowed := getattr(engine, limit)) is not None and value > allowed:
            yield Problem(
                rules.ENGINE_LIMITS,
                f"{name} has {limit}={allowed}, but the timed requests need {value}",
                f"raise {limit}, or {smaller}",
            )


def engine_of(source: str, chain: Chain) -> BuildEngineConfig | None:
    """Returns an engine's settings; ``None`` if ``source`` is not an engine.

    ``source`` is a stage of this run, or the directory of a stage.
    """
    stage, manifest = chain.stages.get(source), manifest_of(source)
    if isinstance(stage, BuildEngineConfig):
        return stage
    return built_engine(manifest) if manifest and manifest.kind == "engine" else None


def built_engine(manifest: Manifest) -> BuildEngineConfig:
    """Returns the settings of an engine that was built."""
    names = [item.name for item in fields(BuildEngineConfig)]
    return BuildEngineConfig(**{n: manifest.config[n] for n in names if n in manifest.config})


def any_tensorrt_llm(names: Iterable[str], inputs: Mapping[str, str], chain: Chain) -> bool:
    """Returns whether one of the named inputs is an engine of TensorRT-LLM."""
    engines = (engine_of(inputs.get(name, ""), chain) for name in names)
    return any(engine and engine.backend != "openvino" for engine in engines)


def engine_devices(names: Iterable[str], inputs: Mapping[str, str], chain: Chain) -> int:
    """Returns the devices of the largest engine among the named inputs; 1 without engines."""
    engines = (engine_of(inputs.get(name, ""), chain) for name in names)
    return max((engine.tensor_parallel_size for engine in engines if engine), default=1)


BUILDERS: dict[str, Callable[[BuildEngineConfig, Path, Path], None]] = {
    "openvino": openvino.build,
    "tensorrt_llm": tensorrt_llm.build,
    "tensorrt_llm_pytorch": tensorrt_llm.prepare_pytorch,
}


def model_folder(source: Input, scratch: Path) -> Path:
    """Returns a checkpoint's Hugging Face folder; converts a NeMo checkpoint to ``scratch``."""
    if source.manifest.kind == "checkpoint_hf":
        return source.artifact
    from nemo_convert import convert, nemo

    shutil.rmtree(scratch, ignore_errors=True)  # a killed process may have left it
    convert.to_hf(nemo.find_checkpoint(source.artifact), scratch)
    return scratch
