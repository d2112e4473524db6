"""Settings of ``build_engine``, ``quantize``, ``measure_speed`` and ``evaluate_served``.

Does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from recipes.core.constraints import Count, Threads, integer, one_of
from recipes.core.stage import StageConfig
from recipes.evaluation.settings import EvaluateTasksConfig
from recipes.planning.transformer import Storage

BACKENDS = ("openvino", "tensorrt_llm", "tensorrt_llm_pytorch")
CALIBRATED_FORMATS = ("fp8", "int4_awq")
"""Formats of the stage ``quantize``; they need calibration text. ``build_engine`` converts to all
other precisions without text. SmoothQuant is missing, because no layer of TensorRT-LLM reads the
tensors that ModelOpt writes for SmoothQuant."""
KV_CACHE_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "u8": 1, "fp8": 1}
"""Bytes of a value in the KV cache, by ``kv_cache_dtype``."""
Grid = Annotated[list[Count], Field(min_length=1)]
"""Values of one dimension of the grid that ``measure_speed`` measures."""


@dataclass
class MeasureSpeedConfig(StageConfig):
    """Settings of ``measure_speed``."""

    batch_sizes: Grid = field(default_factory=lambda: [1, 4])
    """Batch sizes; each is measured with each prompt length."""
    prompt_tokens: Grid = field(default_factory=lambda: [128])
    """Lengths of prompts."""
    new_tokens: Annotated[int, integer(2)] = 32
    """Tokens generated after each prompt. The decoding rate does not count the first one."""
    repetitions: Count = 3
    """Measurements of each batch size and prompt length, after a warm-up."""
    baseline: bool = True
    """Whether to measure transformers, too (eager, float32, on the CPU)."""
    threads: Threads | None = None
    """CPU threads of each model; by default as many as the launcher assigns to a process."""


@dataclass
class BuildEngineConfig(StageConfig):
    """Settings of ``build_engine``."""

    backend: Annotated[str, one_of(*BACKENDS)] = "openvino"
    """``openvino``, ``tensorrt_llm`` or ``tensorrt_llm_pytorch``."""
    precision: str = "fp32"
    """Type of the weights. This stage compresses to ``int8`` and ``int4``; ``fp8`` and ``int4_awq``
    need a checkpoint of ``quantize``."""
    group_size: Count = 64
    """Weights that share a scale, for OpenVINO's ``int4``."""
    kv_cache_dtype: str = "auto"
    """Type of keys and values. ``auto``: float32 in float32 engines, else the backend's default."""
    tensor_parallel_size: Count = 1
    """GPUs that share the engine."""
    max_batch_size: Count = 8
    """Largest batch. This and the three limits below are for TensorRT-LLM; OpenVINO has no limits.
    """
    max_input_len: Count | None = None
    """Longest prompt; by default ``max_seq_len`` minus one new token."""
    max_seq_len: Annotated[int, integer(2)] | None = None
    """Longest prompt together with its new tokens; by default all positions of the model."""
    max_num_tokens: Count = 8192
    """Maximum tokens of all requests together in one step of the engine."""
    seq_length: Count = 256
    """Tokens of a held-out sequence."""
    num_sequences: Count = 8
    """Held-out sequences of ``seq_length`` tokens on which quality is measured."""

    @property
    def scale_group(self) -> int | None:
        """Number of weights that share a scale; ``None`` for precisions without groups.

        Only OpenVINO's ``int4`` uses ``group_size``. TensorRT-LLM's ``int4`` (``W4A16``) has
        one scale per output channel.
        """
        uses_groups = self.backend == "openvino" and self.precision == "int4"
        return self.group_size if uses_groups else None

    @property
    def storage(self) -> Storage:
        """Types of weights and KV cache."""
        if self.precision == "fp32":
            auto_bytes = 4
        elif self.backend == "openvino":
            auto_bytes = 1  # OpenVINO's default is an 8-bit KV cache
        else:
            auto_bytes = 2
        kv_bytes = KV_CACHE_BYTES.get(self.kv_cache_dtype, auto_bytes)  # "auto" is not a key
        return Storage(self.precision, self.scale_group, kv_bytes)


@dataclass
class QuantizeConfig(StageConfig):
    """Settings of ``quantize``."""

    format: Annotated[str, one_of(*CALIBRATED_FORMATS)] = "fp8"
    """``fp8`` (weights and activations) or ``int4_awq`` (weights)."""
    kv_cache_dtype: Annotated[str, one_of("auto", "fp8")] = "auto"
    """With ``fp8``, scales of the KV cache are calibrated, too."""
    seq_length: Count = 256
    """Tokens of a calibration or held-out sequence."""
    num_sequences: Count = 128
    """Calibration sequences of ``seq_length`` tokens; fewer if the calibration text is shorter."""
    num_eval_sequences: Count = 8
    """Held-out sequences on which the quality before and after quantization is compared."""


@dataclass
class EvaluateServedConfig(EvaluateTasksConfig):
    """Settings of ``evaluate_served``.

    ``precision`` and ``pack_tokens`` apply to the student, and not to the served model.
    """

    seq_length: Count = 256
    """Tokens of a sequence of held-out text."""
    num_sequences: Count = 8
    """Held-out sequences on which the perplexity of a GGUF file is measured, in llama.cpp. The
    perplexity of an OpenVINO engine is measured by ``build_engine``."""
    max_length: Count = 4096
    """Maximum tokens of a prompt, for the served model and the student. A longer prompt loses its
    first tokens."""
    threads: Threads | None = field(default=None, metadata={"resource": True})
    """CPU threads of llama.cpp; by default as many as the launcher assigns to a process."""
    start_seconds: Count = field(default=900, metadata={"resource": True})
    """Maximum time for the server to load the model."""
