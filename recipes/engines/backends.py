"""Checks, requirements and builders of engines by backend. Does not import torch."""

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
from recipes.engines.settings import CALIBRATED_FORMATS, BuildEngineConfig, QuantizeConfig
from recipes.engines.timing import RequestShape
from recipes.planning import rules
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.limits import fp8_problems
from recipes.planning.rules import Problem, first_problems

PRECISIONS = {
    "openvino": openvino.PRECISIONS,
    "tensorrt_llm": tensorrt_llm.ENGINE_PRECISIONS,
    "tensorrt_llm_pytorch": tensorrt_llm.PYTORCH_PRECISIONS,
}
"""Supported values of ``precision``, by backend."""
KV_CACHE_DTYPES = {
    "openvino": openvino.KV_CACHE_DTYPES,
    "tensorrt_llm": tensorrt_llm.KV_CACHE_DTYPES,
    "tensorrt_llm_pytorch": tensorrt_llm.KV_CACHE_DTYPES,
}
"""Supported values of ``kv_cache_dtype``, by backend."""


def engine_problems(cfg: BuildEngineConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of settings that would make the build fail after hours of training."""
    for name, choices in (("precision", PRECISIONS), ("kv_cache_dtype", KV_CACHE_DTYPES)):
        value = getattr(cfg, name)
        if value not in choices[cfg.backend]:
            supporting = [backend for backend in choices if value in choices[backend]]
            overrides = [_backend_override(cfg.backend, backend, value) for backend in supporting]
            fixes = [f"use one of: {', '.join(choices[cfg.backend])}", *overrides]
            yield Problem(
                rules.FORMAT,
                f"backend={cfg.backend} does not support {name}={value}",
                ", or ".join(fixes),
            )
    yield from _length_problems(cfg, chain)
    yield from _format_problems(cfg, chain)
    if cfg.backend == "openvino":
        yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)
        yield from openvino.problems(cfg)
    else:
        if cfg.precision == "fp8":
            yield from fp8_problems(chain.hardware, *tensorrt_llm.FP8_REQUIREMENT)
        checkpoint = cfg.inputs.get("checkpoint", "")
        source = chain.stages.get(checkpoint)
        yield from first_problems(  # the problems of the first shape that has any
            tensorrt_llm.problems(cfg, shape, source) for shape in chain.shapes_of(checkpoint)
        )


def _format_problems(cfg: BuildEngineConfig, chain: Chain) -> Iterator[Problem]:
    """Checks that a checkpoint is quantized if, and only if, the engine's precision needs this."""
    checkpoint = cfg.inputs.get("checkpoint", "")
    stage, manifest = chain.stages.get(checkpoint), manifest_of(checkpoint)
    if stage is not None:
        quantized_to = stage.format if isinstance(stage, QuantizeConfig) else None
    elif manifest is not None:  # the checkpoint is of another run
        quantized_to = manifest.config["format"] if manifest.stage == "quantize" else None
    else:  # the engines of a search have no checkpoint
        return
    needed = cfg.precision if cfg.precision in CALIBRATED_FORMATS else None
    # ``engine_problems`` reports precisions that the backend does not support.
    if needed != quantized_to and cfg.precision in PRECISIONS[cfg.backend]:
        source = f"a quantize stage with format={needed}" if needed else "an unquantized model"
        state = f"quantized to {quantized_to}" if quantized_to else "not quantized"
        yield Problem(
            rules.FORMAT,
            f"{cfg.name} has precision={cfg.precision}, which needs a checkpoint of {source}, "
            f"but that of {checkpoint} is {state}",
            f"set inputs.checkpoint to {source}, or another precision",
        )


def _backend_override(current: str, backend: str, value: str) -> str:
    """Returns the override that selects ``backend`` instead of the backend ``current``.

    ``value`` is the precision or KV cache dtype to support. A change between OpenVINO and
    TensorRT-LLM needs other stages, and so another config of the Hydra group ``engine``.
    """
    if "openvino" not in (current, backend):
        return f"backend={backend}"
    suffix = "_quantized" if value in CALIBRATED_FORMATS else ""
    engine = backend if backend == "openvino" else f"tensorrt_llm{suffix}"
    return f"engine={engine} (backend={backend})"


def _length_problems(cfg: BuildEngineConfig, chain: Chain) -> Iterator[Problem]:
    """Checks that ``max_input_len`` < ``max_seq_len`` <= the model's positions."""
    positions = chain.teacher.max_position_embeddings
    max_seq_len = cfg.max_seq_len or positions
    if max_seq_len > positions:
        yield Problem(
            rules.MAX_SEQ_LEN,
            f"max_seq_len={cfg.max_seq_len} is more than the model's {positions} positions",
            f"set max_seq_len to at most {positions}",
        )
    if cfg.max_input_len is not None and cfg.max_input_len >= max_seq_len:
        yield Problem(
            rules.MAX_INPUT_LEN,
            f"max_input_len={cfg.max_input_len} is not less than max_seq_len={max_seq_len}, which "
            "includes the new tokens",
            f"set max_input_len to at most {max_seq_len - 1}",
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

    Args:
        shape: The largest batch of requests.
        engine: The engine's settings.
        name: The engine's name in messages.
        smaller: How to make the requests smaller: the second fix of the message.
    """
    if engine.backend == "openvino":  # has no limits
        return
    # All prompts of a batch together must not exceed ``max_num_tokens``. Otherwise TensorRT-LLM
    # computes them in several steps, and the measured decoding rate is too low.
    needed = {
        "max_batch_size": shape.batch_size,
        "max_input_len": shape.prompt_tokens,
        "max_seq_len": shape.prompt_tokens + shape.new_tokens,
        "max_num_tokens": shape.batch_size * shape.prompt_tokens,
    }
    for limit, value in needed.items():
        allowed = getattr(engine, limit)  # ``None`` means no limit
        if allowed is not None and value > allowed:
            yield Problem(
                rules.ENGINE_LIMITS,
                f"{name} has {limit}={allowed}, but the timed requests need {value}",
                f"raise {limit}, or {smaller}",
            )


def engine_of(source: str, chain: Chain) -> BuildEngineConfig | None:
    """Returns an engine's settings; ``None`` if ``source`` is not an engine.

    ``source`` is the name of a stage of this run, or the directory of a completed stage.
    """
    stage, manifest = chain.stages.get(source), manifest_of(source)
    if isinstance(stage, BuildEngineConfig):
        return stage
    return built_engine(manifest) if manifest and manifest.kind == "engine" else None


def built_engine(manifest: Manifest) -> BuildEngineConfig:
    """Returns the settings of a built engine; defaults for settings that its manifest lacks."""
    names = {item.name for item in fields(BuildEngineConfig)}
    settings = {name: value for name, value in manifest.config.items() if name in names}
    return BuildEngineConfig(**settings)


def any_tensorrt_llm(names: Iterable[str], inputs: Mapping[str, str], chain: Chain) -> bool:
    """Returns whether any of the ``inputs`` with these names is an engine of TensorRT-LLM."""
    engines = (engine_of(inputs.get(name, ""), chain) for name in names)
    return any(engine and engine.backend != "openvino" for engine in engines)


def engine_devices(names: Iterable[str], inputs: Mapping[str, str], chain: Chain) -> int:
    """Returns the devices of the largest engine among these ``inputs``; 1 without engines."""
    engines = (engine_of(inputs.get(name, ""), chain) for name in names)
    return max((engine.tensor_parallel_size for engine in engines if engine), default=1)


BUILDERS: dict[str, Callable[[BuildEngineConfig, Path, Path], None]] = {
    "openvino": openvino.build,
    "tensorrt_llm": tensorrt_llm.build,
    "tensorrt_llm_pytorch": tensorrt_llm.prepare_pytorch,
}
"""Maps a backend to the function that builds its engine from the settings, a Hugging Face folder
and the folder of the new engine."""


def model_folder(source: Input, scratch: Path) -> Path:
    """Returns a checkpoint's Hugging Face folder; converts a NeMo checkpoint to ``scratch``."""
    if source.manifest.kind == "checkpoint_hf":
        return source.artifact
    from nemo_convert import convert, nemo

    shutil.rmtree(scratch, ignore_errors=True)  # a killed process may have left it
    convert.to_hf(nemo.find_checkpoint(source.artifact), scratch)
    return scratch
