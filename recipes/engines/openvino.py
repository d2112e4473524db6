"""OpenVINO engines: building them from a Hugging Face folder, and running them on a CPU.

Chosen over ONNX Runtime GenAI, llama.cpp and AOTInductor: it gives transformers' tokens in float32
for every shape that pruning makes, installs as wheels, and was the fastest of those that do.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.core.files import read_json, write_json
from recipes.engines.settings import BuildEngineConfig
from recipes.engines.timing import Generation, Timing
from recipes.planning import rules
from recipes.planning.problems import Problem

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike

PRECISIONS = ("fp32", "int8", "int4")
KV_CACHE_DTYPES = ("auto", "f32", "f16", "bf16", "u8")
DEVICE = "CPU"
STORED = {"int8": ("u8", "i8"), "int4": ("u4", "i4")}
"""OpenVINO's types of compressed weights."""
SETTINGS = "engine.json"
"""Beside the engine: the properties that it was checked with, and is to be run with."""


def problems(cfg: BuildEngineConfig) -> Iterator[Problem]:
    """Settings that OpenVINO has no meaning for."""
    if cfg.tensor_parallel_size != 1:
        yield Problem(
            rules.TENSOR_PARALLEL,
            f"tensor_parallel_size={cfg.tensor_parallel_size}, but OpenVINO runs on one CPU",
            "set it to 1, or use engine=tensorrt_llm",
        )


def properties(cfg: BuildEngineConfig) -> dict[str, str]:
    """How the engine is to be run.

    A float32 engine computes in float32 throughout: on CPUs with bfloat16 units OpenVINO would
    otherwise round activations, and keep an 8-bit KV cache. Compressed ones leave that to it.
    """
    found = {"INFERENCE_PRECISION_HINT": "f32"} if cfg.precision == "fp32" else {}
    kv_cache = "f32" if (cfg.kv_cache_dtype, cfg.precision) == ("auto", "fp32") else None
    if cfg.kv_cache_dtype != "auto":
        kv_cache = cfg.kv_cache_dtype
    return {**found, **({"KV_CACHE_PRECISION": kv_cache} if kv_cache else {})}


def without_telemetry() -> None:
    """OpenVINO would write an identity into the home folder when imported, except where CI is set.

    Only this process and its children see the variable.
    """
    os.environ["CI"] = "true"


def build(cfg: BuildEngineConfig, folder: Path, out: Path) -> None:
    """Converts a Hugging Face folder; the engine and its tokenizer are written to ``out``."""
    without_telemetry()
    import torch
    from optimum.intel import OVModelForCausalLM

    with _full_disk_named(out), _temporary_files(out.parent):
        model = OVModelForCausalLM.from_pretrained(
            folder,
            export=True,
            compile=False,
            trust_remote_code=False,
            torch_dtype=torch.float32,  # "dtype" is not passed on; bfloat16 weights would stay so
            **_compression(cfg),
        )
        model.save_pretrained(out)
        _write_tokenizer(folder, out)
    settings = {"backend": cfg.backend, "precision": cfg.precision, "properties": properties(cfg)}
    write_json(out / SETTINGS, settings)


@contextmanager
def _full_disk_named(out: Path) -> Iterator[None]:
    """OpenVINO says ``iostream error`` of a full disk, and has deleted what had filled it."""
    try:
        yield
    except RuntimeError as error:
        if "iostream error" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error


@contextmanager
def _temporary_files(parent: Path) -> Iterator[None]:
    """Puts temporary files below ``parent``, and deletes them.

    optimum writes the whole engine to one first, which it deletes as the interpreter exits: not
    where the process was forked, or killed.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=parent) as tempfile.tempdir:
        try:
            yield
        finally:
            tempfile.tempdir = before


def _compression(cfg: BuildEngineConfig) -> dict[str, Any]:
    from optimum.intel import OVWeightQuantizationConfig

    if cfg.precision == "fp32":
        return {"load_in_8bit": False}  # which optimum would do to models beyond a size
    if cfg.precision == "int8":
        return {"quantization_config": OVWeightQuantizationConfig(bits=8)}
    config = OVWeightQuantizationConfig(
        bits=4,
        group_size=cfg.group_size,
        ratio=1.0,
        # A pruned width need not be a multiple of the group.
        group_size_fallback="adjust",
    )
    return {"quantization_config": config}


def _write_tokenizer(folder: Path, out: Path) -> None:
    """Saves the tokenizer as it was, and compiled, so that the engine takes text by itself."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # Of several templates transformers 4.57 makes files of any name, anywhere (CVE-2026-9856).
    several = isinstance(tokenizer.chat_template, dict)
    tokenizer.save_pretrained(out, save_jinja_files=not several)
    models = convert_tokenizer(tokenizer, with_detokenizer=True)
    for model, name in zip(models, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(model, out / f"openvino_{name}.xml")


def read_properties(engine: Path) -> dict[str, str]:
    """The properties that an engine was checked with."""
    settings = read_json(engine / SETTINGS)
    found: dict[str, str] = settings["properties"]
    return found


def weight_types(engine: Path) -> dict[str, int]:
    """Number of stored values by type, biggest first; those of norms and constants are a few."""
    import openvino

    found: Counter[str] = Counter()
    for node in openvino.Core().read_model(engine / "openvino_model.xml").get_ops():
        if node.get_type_name() == "Constant":
            found[node.get_element_type().get_type_name()] += math.prod(node.get_output_shape(0))
    return dict(found.most_common())


class Logits:
    """An engine's graph as something that maps tokens to logits, for measuring its quality.

    The generation pipeline gives no logits of a prompt, so the same graph is run by itself.
    """

    def __init__(self, engine: Path) -> None:
        without_telemetry()
        from optimum.intel import OVModelForCausalLM

        self._model = OVModelForCausalLM.from_pretrained(
            engine, device=DEVICE, ov_config=read_properties(engine), trust_remote_code=False
        )

    def __call__(self, tokens: torch.Tensor) -> Any:
        """Output with ``logits`` [batch, sequence, vocabulary]."""
        import torch

        return self._model(tokens, attention_mask=torch.ones_like(tokens))


class Pipeline:
    """An engine as it is deployed: OpenVINO GenAI's pipeline, on token ids."""

    def __init__(self, engine: Path, threads: int | None = None) -> None:
        without_telemetry()
        import openvino_genai

        options: dict[str, Any] = {**read_properties(engine)}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self._pipeline = openvino_genai.LLMPipeline(engine, DEVICE, **options)

    def generate(self, tokens: ArrayLike, new_tokens: int) -> Generation:
        """Continues prompts [batch, sequence] greedily by exactly ``new_tokens`` tokens."""
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            ignore_eos=True,
            do_sample=False,
            apply_chat_template=False,
        )
        ids = np.asarray(tokens, np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        began = time.perf_counter()
        result = self._pipeline.generate(inputs, config)
        total = time.perf_counter() - began
        first = result.perf_metrics.get_ttft().mean / 1000
        return Generation([list(ids) for ids in result.tokens], Timing(first, total))
