"""Builds OpenVINO engines from Hugging Face folders, and runs them on a CPU.

OpenVINO was faster than ONNX Runtime GenAI, llama.cpp and AOTInductor. It installs as wheels. In
float32 it generates the same tokens as transformers for every pruned shape.
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
from recipes.planning.rules import Problem

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from optimum.intel import OVModelForCausalLM

PRECISIONS = ("fp32", "int8", "int4")
KV_CACHE_DTYPES = ("auto", "f32", "f16", "bf16", "u8")
DEVICE = "CPU"
COMPRESSED_TYPES = {"int8": ("u8", "i8"), "int4": ("u4", "i4")}
"""OpenVINO's names of the types of compressed weights, by precision."""
SETTINGS = "engine.json"
"""File in the engine's folder that has the result of ``properties``."""


def problems(cfg: BuildEngineConfig) -> Iterator[Problem]:
    """Yields settings that OpenVINO does not support."""
    if cfg.tensor_parallel_size != 1:
        yield Problem(
            rules.TENSOR_PARALLEL,
            f"tensor_parallel_size={cfg.tensor_parallel_size}, but OpenVINO runs on one CPU",
            "set tensor_parallel_size=1, or engine=tensorrt_llm",
        )


def properties(cfg: BuildEngineConfig) -> dict[str, str]:
    """Returns OpenVINO's properties for running an engine.

    A float32 engine computes only in float32. By default, OpenVINO has an 8-bit KV cache, and
    computes in bfloat16 on CPUs that support it. Compressed engines keep these defaults.
    """
    values = {}
    if cfg.precision == "fp32":
        values = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    if cfg.kv_cache_dtype != "auto":
        values["KV_CACHE_PRECISION"] = cfg.kv_cache_dtype
    return values


def disable_telemetry() -> None:
    """Sets the variable ``CI``, so that OpenVINO's import writes no user id to the home folder."""
    os.environ["CI"] = "true"


def build(cfg: BuildEngineConfig, folder: Path, out: Path) -> None:
    """Converts a Hugging Face folder to an engine with a tokenizer, in ``out``."""
    disable_telemetry()
    import torch
    from optimum.intel import OVModelForCausalLM

    with _full_disk_errors(out), _temporary_files(out.parent):
        model = OVModelForCausalLM.from_pretrained(
            folder,
            export=True,
            compile=False,
            trust_remote_code=False,
            torch_dtype=torch.float32,  # not "dtype": optimum ignores it and keeps bfloat16
            **_compression(cfg),
        )
        model.save_pretrained(out)
        _write_tokenizer(folder, out)
    settings = {"backend": cfg.backend, "precision": cfg.precision, "properties": properties(cfg)}
    write_json(out / SETTINGS, settings)


def load_engine(engine: Path) -> OVModelForCausalLM:
    """Loads an engine as a model with the interface of transformers, which returns logits."""
    disable_telemetry()
    from optimum.intel import OVModelForCausalLM

    return OVModelForCausalLM.from_pretrained(
        engine, device=DEVICE, ov_config=read_properties(engine), trust_remote_code=False
    )


@contextmanager
def _full_disk_errors(out: Path) -> Iterator[None]:
    """Raises an ``OSError`` about a full disk instead of OpenVINO's ``iostream error``.

    Free space is not checked: OpenVINO has already deleted its partial file, so there is space.
    """
    try:
        yield
    except RuntimeError as error:
        if "iostream error" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error


@contextmanager
def _temporary_files(parent: Path) -> Iterator[None]:
    """Makes ``tempfile`` create files in a new folder in ``parent``; deletes it after the context.

    optimum writes the whole engine to a temporary file. It deletes the file only when the
    interpreter exits normally. A forked or killed process does not exit normally.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


def _compression(cfg: BuildEngineConfig) -> dict[str, Any]:
    """Returns the arguments of ``from_pretrained`` that set the type of the weights."""
    from optimum.intel import OVWeightQuantizationConfig

    if cfg.precision == "fp32":
        return {"load_in_8bit": False}  # optimum's default for large models is 8 bits
    if cfg.precision != "int4":  # that is, int8
        return {"quantization_config": OVWeightQuantizationConfig(bits=8)}
    # A ratio of 1.0 compresses all layers to 4 bits. If a layer's number of inputs is no multiple
    # of the group size, "adjust" lowers the layer's group size to the largest power of 2 that
    # divides the number of inputs. If this power is below 32, the layer keeps 8 bits.
    int4 = OVWeightQuantizationConfig(
        bits=4, ratio=1.0, group_size_fallback="adjust", group_size=cfg.group_size
    )
    return {"quantization_config": int4}


def _write_tokenizer(folder: Path, out: Path) -> None:
    """Saves the tokenizer for transformers, and as OpenVINO models that text pipelines use."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # ``chat_template`` is a dict of templates by name if there are several. transformers 4.57 would
    # write each template to the path that its name contains (CVE-2026-9856).
    has_several_templates = isinstance(tokenizer.chat_template, dict)
    tokenizer.save_pretrained(out, save_jinja_files=not has_several_templates)
    models = convert_tokenizer(tokenizer, with_detokenizer=True)
    for model, name in zip(models, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(model, out / f"openvino_{name}.xml")


def read_properties(engine: Path) -> dict[str, str]:
    """Reads the ``properties`` with which an engine was built."""
    stored: dict[str, str] = read_json(engine / SETTINGS)["properties"]
    return stored


def weight_types(engine: Path) -> dict[str, int]:
    """Maps OpenVINO's name of a type to the number of its stored values, most frequent first."""
    import openvino

    counts: Counter[str] = Counter()
    for node in openvino.Core().read_model(engine / "openvino_model.xml").get_ops():
        if node.get_type_name() == "Constant":
            counts[node.get_element_type().get_type_name()] += math.prod(node.get_output_shape(0))
    return dict(counts.most_common())


class Pipeline:
    """Runs an engine on token ids with OpenVINO GenAI, as in deployment. Returns no logits."""

    def __init__(self, engine: Path, threads: int | None = None) -> None:
        disable_telemetry()
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
        start = time.perf_counter()
        result = self._pipeline.generate(inputs, config)
        total_seconds = time.perf_counter() - start
        first_seconds = result.perf_metrics.get_ttft().mean / 1000  # from milliseconds
        timing = Timing(first_seconds, total_seconds)
        return Generation([list(sequence) for sequence in result.tokens], timing)
