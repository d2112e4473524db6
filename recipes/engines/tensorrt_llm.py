"""Checks settings for TensorRT-LLM and runs it as a subprocess in NVIDIA's image.

This module does not import TensorRT-LLM, which needs other versions of torch, transformers and
ModelOpt than the pinned stack. Release 1.2 is the last that builds engines; 1.3 removed
``trtllm-build`` and the engine backend.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.files import link_or_copy, read_json, write_json, write_text_atomically
from recipes.core.processes import die_with_parent
from recipes.core.stage import StageConfig
from recipes.core.versions import installed_version
from recipes.engines import trtllm_build_worker
from recipes.engines.settings import CALIBRATED_FORMATS, BuildEngineConfig, QuantizeConfig
from recipes.planning import rules
from recipes.planning.hardware import gpus_here
from recipes.planning.rules import Problem

VERSION = "1.2.0"
IMAGE = f"nvcr.io/nvidia/tensorrt-llm/release:{VERSION}"
FIRST_RELEASE_WITHOUT_ENGINES = (1, 3)
"""First release, as (major, minor), that cannot build TensorRT engines."""

DTYPES = {"fp16": "float16"}
"""Type of activations and unquantized weights, by precision; bfloat16 in all other precisions."""
QUANT_ALGOS = {"int8": "W8A16", "int4": "W4A16", "fp8": "FP8", "int4_awq": "W4A16_AWQ"}
"""TensorRT-LLM's and ModelOpt's name of each quantized precision."""
ENGINE_PRECISIONS = ("bf16", "fp16", "int8", "int4", "fp8")
"""Precisions of TensorRT engines. AWQ is missing: the engine builder reads the scales from
``input_quantizer._pre_quant_scale``, but ModelOpt writes them to ``pre_quant_scale``."""
PYTORCH_PRECISIONS = ("bf16", "fp8", "int4_awq")
KV_CACHE_DTYPES = ("auto", "fp8")
"""int8 is missing: it would need scales that ModelOpt's checkpoints do not have."""

HEAD_SIZES = (32, 48, 64, 80, 96, 104, 112, 128, 144, 160, 192, 224, 256)
"""Head sizes of the compiled attention kernels, which both backends use
(``cpp/tensorrt_llm/common/attentionOp.cpp``)."""
SIZE_MULTIPLES = {"int8": 64, "int4": 64, "int4_awq": 128, "fp8": 16}
"""By precision: rows and columns of a rank's quantized matrices must be multiples of this."""
FP8_REQUIREMENT = (
    8.9,
    "use engine=tensorrt_llm; or stages.quantize.format=int4_awq with "
    "stages.build_engine.backend=tensorrt_llm_pytorch",
)
"""The lowest compute capability of GPUs with FP8, and what to do on older GPUs."""
LAUNCHER = "TENSORRT_LLM_LAUNCHER"
"""Environment variable with the command that starts TensorRT-LLM's programs, such as mpirun with
options."""
LLM_OPTIONS = "llm_options.yaml"
"""File in the PyTorch backend's artifact. TensorRT-LLM reads it by ``--extra_llm_api_options``."""
QUANTIZATION = "hf_quant_config.json"
"""File in which ModelOpt writes how a checkpoint is quantized."""


def problems(
    cfg: BuildEngineConfig, arch: Architecture, source: StageConfig | None
) -> Iterator[Problem]:
    """Yields a problem for each shape and setting that the builder or its kernels do not support.

    ``source`` is the config of the stage that made the checkpoint; ``None`` if that stage is not in
    this run.
    """
    if cfg.backend == "tensorrt_llm" and cfg.kv_cache_dtype == "fp8":
        yield from _scale_problems(cfg.precision, source)
    source_kv = source.kv_cache_dtype if isinstance(source, QuantizeConfig) else "auto"
    if cfg.kv_cache_dtype == "auto" and source_kv != "auto":
        yield Problem(
            rules.KV_CACHE,
            f"the quantize stage declares a KV cache in {source_kv}, which the engine would use, "
            "but its memory and speed are planned for kv_cache_dtype=auto",
            f"set kv_cache_dtype={source_kv} in both stages, or auto in both",
        )
    if cfg.backend == "tensorrt_llm" and arch.num_moe_experts:
        # tensorrt_llm/models/qwen/config.py never normalizes the router's probabilities.
        yield Problem(
            rules.ENGINE_MODEL,
            "TensorRT-LLM's engine builder ignores norm_topk_prob of mixtures of experts, so the "
            "engine's answers would be wrong",
            f"set stages.{cfg.name}.backend=tensorrt_llm_pytorch",
        )
    if arch.kv_channels not in HEAD_SIZES:
        yield Problem(
            rules.HEAD_SIZE,
            f"TensorRT-LLM has no attention kernel for a head size of {arch.kv_channels}, only for "
            f"{', '.join(map(str, HEAD_SIZES))}",
            "set engine=null with gguf=f16, or engine=openvino",
        )
    ranks = cfg.tensor_parallel_size
    yield from _parallel_problems(ranks, arch)
    multiple = SIZE_MULTIPLES.get(cfg.precision, 1)
    for name, size, shards in matrix_sizes(arch, ranks):
        shard_size = size // shards
        if shard_size % multiple:
            yield Problem(
                rules.ALIGNMENT,
                f"precision={cfg.precision} needs multiples of {multiple}, but {name} is "
                f"{shard_size} on each rank",
                f"prune to a multiple of {multiple * shards}, or use precision=bf16",
            )


def matrix_sizes(arch: Architecture, ranks: int) -> tuple[tuple[str, int, int], ...]:
    """Returns each dimension of quantized matrices: its name, size and number of shards."""
    feed_forward = _feed_forward(arch)
    return (
        ("hidden_size", arch.hidden_size, 1),  # tensor parallelism does not split it
        (feed_forward, getattr(arch, feed_forward), ranks),
        ("num_attention_heads * kv_channels", arch.num_attention_heads * arch.kv_channels, ranks),
    )


def _feed_forward(arch: Architecture) -> str:
    """Returns the name of the model's feed-forward size: that of the experts in an MoE."""
    return "moe_ffn_hidden_size" if arch.num_moe_experts else "ffn_hidden_size"


def _scale_problems(precision: str, source: StageConfig | None) -> Iterator[Problem]:
    """Yields a problem if an fp8 KV cache has no calibrated scales."""
    if precision != "fp8":
        yield Problem(
            rules.KV_CACHE,
            f"precision={precision} with kv_cache_dtype=fp8 has no calibrated scales of the KV "
            "cache, so the builder would download a data set to calibrate them",
            "use precision=fp8 from a quantize stage, kv_cache_dtype=auto, or "
            "backend=tensorrt_llm_pytorch",
        )
    elif isinstance(source, QuantizeConfig) and source.kv_cache_dtype != "fp8":
        yield Problem(
            rules.KV_CACHE,
            "kv_cache_dtype=fp8, but the quantize stage does not calibrate scales of the KV cache",
            "set kv_cache_dtype=fp8 in the quantize stage, too",
        )


def _parallel_problems(ranks: int, arch: Architecture) -> Iterator[Problem]:
    """Yields a problem for each size that cannot be distributed evenly over the ranks."""
    for name in ("num_attention_heads", _feed_forward(arch)):
        if getattr(arch, name) % ranks:
            yield Problem(
                rules.TENSOR_PARALLEL,
                f"{name}={getattr(arch, name)} is not divisible by tensor_parallel_size={ranks}",
                "lower tensor_parallel_size",
            )
    groups = arch.num_query_groups
    if groups % ranks and ranks % groups:
        yield Problem(
            rules.TENSOR_PARALLEL,
            f"{groups} query groups can be neither split nor repeated over {ranks} ranks",
            f"use a tensor_parallel_size that divides {groups} or is a multiple of it",
        )


def machine_problem(backend: str, version: str | None, gpu: bool) -> RecipeError | None:
    """Returns why a machine cannot run a backend; ``None`` if it can.

    ``version`` is the installed version of TensorRT-LLM; ``None`` if it is not installed. ``gpu``
    says whether the machine has an NVIDIA GPU.
    """
    missing = [] if gpu else ["an NVIDIA GPU"]
    if version is None:
        missing.append("TensorRT-LLM (PyPI's package of that name is only a placeholder)")
    if missing:
        return RecipeError(
            f"backend={backend} needs {' and '.join(missing)}, which this machine does not have",
            f"run this stage on a GPU in {IMAGE}, or set engine=openvino for a CPU",
        )
    release = tuple(int(number) for number in str(version).split(".")[:2])  # (major, minor)
    if backend == "tensorrt_llm" and release >= FIRST_RELEASE_WITHOUT_ENGINES:
        return RecipeError(
            f"TensorRT-LLM {version} cannot build engines; 1.2 is the last release that can",
            f"run this stage in {IMAGE}, or set backend=tensorrt_llm_pytorch",
        )
    return None


def launcher() -> list[str]:
    """Returns the words of ``LAUNCHER``, to put before a command; empty if it is not set."""
    return shlex.split(os.environ.get(LAUNCHER, ""))


def require(backend: str) -> None:
    """Raises ``RecipeError`` unless this machine can run a backend of TensorRT-LLM."""
    if problem := machine_problem(backend, installed_version("tensorrt_llm"), gpus_here() > 0):
        raise problem


def declared_quantization(folder: Path) -> str | None:
    """Returns a checkpoint's algorithm, a value of ``QUANT_ALGOS``; ``None`` if not quantized."""
    file = folder / QUANTIZATION
    return read_json(file)["quantization"]["quant_algo"] if file.is_file() else None


def require_quantization(folder: Path, precision: str) -> None:
    """Raises ``RecipeError`` unless a checkpoint has the quantization that ``precision`` needs.

    Precisions without calibration need a checkpoint that is not quantized.
    """
    algorithm = declared_quantization(folder)
    expected = QUANT_ALGOS[precision] if precision in CALIBRATED_FORMATS else None
    if algorithm != expected:
        if expected:
            fix = f"set inputs.checkpoint to a quantize stage with format={precision}"
        else:
            fix = "set inputs.checkpoint to the stage before quantize, or precision to its format"
        raise RecipeError(
            f"precision={precision} needs a checkpoint with quantization {expected or 'none'}, but "
            f"{folder} has {algorithm or 'none'}",
            fix,
        )


def build_request(
    cfg: BuildEngineConfig, folder: Path, out: Path, positions: int
) -> dict[str, Any]:
    """Returns the content of the file from which ``trtllm_build_worker`` builds an engine.

    Each key except ``engine_dir`` maps to the arguments of a class of TensorRT-LLM. The class LLM
    builds the engine, because it also reads ModelOpt's checkpoints, and because TensorRT-LLM's
    package does not have the conversion scripts of its examples. ``folder`` is the Hugging Face
    folder, ``out`` the engine's folder, and ``positions`` the model's number of positions.
    """
    max_seq_len = cfg.max_seq_len or positions
    # The settings of ``trtllm-bench build``.
    plugins = {"multiple_profiles": True, "use_paged_context_fmha": True}
    quantization: dict[str, Any] = {}
    if cfg.precision in QUANT_ALGOS:
        quantization["quant_algo"] = QUANT_ALGOS[cfg.precision]
    if cfg.kv_cache_dtype == "fp8":
        quantization["kv_cache_quant_algo"] = "FP8"
        # Not set for a bfloat16 cache, because FP8 attention would read the cache as FP8. FP8
        # engines of ``trtllm-bench`` always have an FP8 cache, so ``trtllm-bench`` always sets it.
        plugins["use_fp8_context_fmha"] = True
    return {
        "engine_dir": str(out),
        "llm": {
            "model": str(folder),
            # By default, TensorRT-LLM would convert float32 weights to float16.
            "dtype": DTYPES.get(cfg.precision, "bfloat16"),
            "tensor_parallel_size": cfg.tensor_parallel_size,
        },
        "build_config": {
            "max_batch_size": cfg.max_batch_size,
            "max_input_len": cfg.max_input_len or max_seq_len - 1,
            "max_seq_len": max_seq_len,
            "max_num_tokens": cfg.max_num_tokens,
        },
        "plugin_config": plugins,
        "quant_config": quantization,
    }


def build(cfg: BuildEngineConfig, folder: Path, out: Path) -> None:
    """Builds a TensorRT engine in a subprocess, and verifies its quantization and sizes.

    Raises ``RecipeError`` if the checkpoint has another quantization, if the build failed, or if
    the engine differs from the config.
    """
    require_quantization(folder, cfg.precision)
    request = build_request(cfg, folder, out, _positions(folder))
    request_file = out.parent / "tensorrt_llm_request.json"
    worker = [sys.executable, "-m", trtllm_build_worker.__name__, str(request_file)]
    # TensorRT-LLM first writes the whole engine into its workspace, by default in /tmp.
    with tempfile.TemporaryDirectory(dir=out.parent) as workspace:
        request["llm"]["workspace"] = workspace
        write_json(request_file, request)
        command = [*launcher(), *worker]
        status = subprocess.run(command, check=False, preexec_fn=die_with_parent).returncode
    if status:
        raise RecipeError(
            f"TensorRT-LLM ended with status {status}; its output is in the stage's log",
            "python launch/run.py logs run_dir=DIR shows it",
        )
    require_engine(out, request)


def require_engine(engine: Path, request: dict[str, Any]) -> None:
    """Raises ``RecipeError`` unless an engine has the quantization and sizes of its request."""
    config = read_json(engine / "config.json")
    pretrained, built = config["pretrained_config"], config["build_config"]
    requested, ranks = request["build_config"], request["llm"]["tensor_parallel_size"]
    algorithm = request["quant_config"].get("quant_algo")
    checks = (  # label, value in the engine, requested value
        ("quant_algo=", pretrained["quantization"]["quant_algo"], algorithm),
        ("max_batch_size=", built["max_batch_size"], requested["max_batch_size"]),
        ("max_seq_len=", built["max_seq_len"], requested["max_seq_len"]),
        ("tp_size=", pretrained["mapping"]["tp_size"], ranks),
        ("rank*.engine files: ", len(list(engine.glob("rank*.engine"))), ranks),
    )
    differences = [
        f"{label}{actual} instead of {expected}"
        for label, actual, expected in checks
        if actual != expected
    ]
    if differences:
        raise RecipeError(
            f"the engine differs from the request: {', '.join(differences)}", f"build it in {IMAGE}"
        )


def prepare_pytorch(cfg: BuildEngineConfig, folder: Path, out: Path) -> None:
    """Writes the artifact of the PyTorch backend: the checkpoint, linked or copied, and options.

    Sets the type in config.json to bfloat16, also for checkpoints in float32. The backend loads and
    computes in this type, and ignores the option ``dtype``.
    """
    require_quantization(folder, cfg.precision)
    shutil.copytree(folder, out, dirs_exist_ok=True, copy_function=link_or_copy)
    config = read_json(folder / "config.json")
    config.pop("dtype", None)  # transformers would prefer it to ``torch_dtype``
    write_json(out / "config.json", config | {"torch_dtype": "bfloat16"})
    write_text_atomically(out / LLM_OPTIONS, llm_options(cfg, _positions(folder)))


def llm_options(cfg: BuildEngineConfig, positions: int) -> str:
    """Returns the content of ``LLM_OPTIONS`` as JSON, which is also YAML."""
    # ``kv_cache_config`` replaces all of TensorRT-LLM's settings of the KV cache, so it must also
    # set the memory fraction. With reuse of blocks, the warm-up would cache the prompts of the
    # measurement.
    options: dict[str, Any] = {
        "max_batch_size": cfg.max_batch_size,
        "max_seq_len": cfg.max_seq_len or positions,
        "max_num_tokens": cfg.max_num_tokens,
        "kv_cache_config": {
            "dtype": cfg.kv_cache_dtype,
            "enable_block_reuse": False,
            "free_gpu_memory_fraction": 0.9,
        },
    }
    return json.dumps(options, indent=1) + "\n"


def _positions(folder: Path) -> int:
    """Returns the number of positions of a Hugging Face model."""
    config = read_json(folder / "config.json")
    return int(config["max_position_embeddings"])
