"""Results of ``build_engine``, ``quantize`` and ``measure_speed``, and rates of machines.

Does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes.core.statistics import Difference
from recipes.evaluation.results import ServedText, TextQuality

BASELINE = "transformers"
"""Name of the backend that is measured for comparison with engines."""


@dataclass(frozen=True)
class Spread:
    """Median and range of several repetitions."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class BenchmarkRow:
    """Speed of one model in one backend, for one batch size and prompt length."""

    role: str
    """``teacher`` or ``student``."""
    backend: str
    precision: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    time_to_first_token_ms: Spread
    decode_tokens_per_second: Spread
    """New tokens of the whole batch, after the first new token of each sequence."""
    throughput_tokens_per_second: Spread
    """Prompt tokens and new tokens of the whole batch."""
    peak_memory_bytes: int
    load_seconds: float
    disk_bytes: int
    """Size of the engine or checkpoint."""

    @property
    def engine(self) -> str:
        """Backend and precision."""
        return f"{self.backend} {self.precision}"

    @property
    def setting(self) -> tuple[int, int]:
        """Batch size and prompt length."""
        return self.batch_size, self.prompt_tokens

    @property
    def decode_latency_ms(self) -> float | None:
        """Median milliseconds per token of a single sequence; ``None`` for larger batches."""
        return 1000 / self.decode_tokens_per_second.median if self.batch_size == 1 else None


@dataclass(frozen=True)
class Speedup:
    """Measured speed-ups of the student over the teacher in one backend, and the roofline's.

    The roofline counts only FLOPs and memory traffic. If a measured speed-up is lower, something
    else takes time, too.
    """

    backend: str
    precision: str
    """The student's precision."""
    batch_size: int
    prompt_tokens: int
    prefill: float
    """The teacher's median time to the first token, divided by the student's."""
    prefill_roofline: float | None
    """``None`` for a student in FP8, because the rate of FP8 GEMMs is not measured."""
    decode: float
    """The student's median rate after the first token, divided by the teacher's."""
    decode_roofline: float


@dataclass(frozen=True)
class TrainingRates:
    """Measured rates of all threads together, for the fields of ``Hardware`` with these names."""

    flops_per_second: float
    """FLOP/s in bfloat16."""
    float32_flops_per_second: float
    bytes_per_second: float

    def __post_init__(self) -> None:
        if not all(isinstance(rate, float) and 0 < rate < math.inf for rate in vars(self).values()):
            raise ValueError(f"invalid rates: {self}; each must be a finite float above 0")


@dataclass(frozen=True)
class MachineRates:
    """A machine and its measured peak rates."""

    cpu: str
    """Name of the processor or GPU."""
    threads: int
    flops_per_second: dict[str, float]
    """FLOP/s by the name of the dtype, such as ``bfloat16``."""
    bytes_per_second: float


@dataclass(frozen=True)
class BenchmarkResults:
    """Speed of teacher and student, measured in turns, so that disturbances affect both."""

    machine: MachineRates
    rows: list[BenchmarkRow]
    speedups: list[Speedup]

    def engine_speedups(self) -> list[Speedup]:
        """Returns the speed-ups in engines; without engines, the speed-ups in the baseline."""
        return [s for s in self.speedups if s.backend != BASELINE] or self.speedups

    def teacher_precision(self, backend: str) -> str:
        """Returns the teacher's precision in a backend; a student's may differ by quantization."""
        teachers = (row for row in self.rows if row.role == "teacher" and row.backend == backend)
        return next(teachers).precision


@dataclass(frozen=True)
class EngineQuality:
    """Quality of an engine and of the model that it was built from, on the same sequences."""

    engine: TextQuality
    source: TextQuality
    sequences: int
    tokens: int
    predictions: int
    """Next-token predictions in the loss."""
    loss_difference: Difference
    """Loss of the engine minus loss of the source model, in nats, paired by sequence."""

    def served_text(self) -> ServedText:
        """Returns this quality, with the engine as served model and the source as student."""
        return ServedText(
            student_perplexity=self.source.perplexity,
            served_perplexity=self.engine.perplexity,
            loss_difference=self.loss_difference,
            sequences=self.sequences,
            predictions=self.predictions,
        )


@dataclass(frozen=True)
class EngineComparison:
    """Comparison of an engine with the model that it was built from."""

    max_logit_difference: float
    greedy_margin: float
    """Largest gap between the source model's best logit and its logit of a token that the engine
    generated; 0 if every generated token has the best logit."""
    weight_types: dict[str, int]
    """Number of stored weights by OpenVINO's name of their data type, such as ``u8``."""
    quality: EngineQuality | None
    """``None`` without held-out text."""


@dataclass(frozen=True)
class EngineResult:
    """A built engine. If it was not compared, the fields of ``EngineComparison`` are ``None``."""

    backend: str
    precision: str
    build_seconds: float
    bytes: int
    """Size on disk."""
    max_logit_difference: float | None = None
    greedy_margin: float | None = None
    weight_types: dict[str, int] | None = None
    quality: EngineQuality | None = None


@dataclass(frozen=True)
class QuantizationQuality:
    """Quality before and after quantization, on the same held-out sequences."""

    source: TextQuality
    quantized: TextQuality


@dataclass(frozen=True)
class QuantizationResult:
    """Result of ``quantize``."""

    quant_algo: str
    """A value of ``tensorrt_llm.QUANT_ALGOS``."""
    quality: QuantizationQuality
