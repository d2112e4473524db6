"""Results of engines: build, quality and speed. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes.core.statistics import Difference
from recipes.evaluation.results import ServedText, TextQuality

BASELINE = "transformers"
"""Backend that is measured for comparison."""


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
    throughput_tokens_per_second: Spread
    peak_memory_bytes: int
    load_seconds: float
    disk_bytes: int

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
    """Speed-up of the student over the teacher, measured and by the roofline; see ``speedups``."""

    backend: str
    precision: str
    batch_size: int
    prompt_tokens: int
    prefill: float
    prefill_roofline: float | None
    """``None`` in FP8, because the rate of FP8 GEMMs is not measured."""
    decode: float
    decode_roofline: float


@dataclass(frozen=True)
class TrainingRates:
    """Measured rates of all threads together. The fields have the same names in ``Hardware``."""

    flops_per_second: float
    float32_flops_per_second: float
    bytes_per_second: float

    def __post_init__(self) -> None:
        if not all(isinstance(rate, float) and 0 < rate < math.inf for rate in vars(self).values()):
            raise ValueError(f"invalid rates: {self}")


@dataclass(frozen=True)
class MachineRates:
    """A machine and its measured peak rates."""

    cpu: str
    """Name of the processor or GPU."""
    threads: int
    flops_per_second: dict[str, float]
    """FLOP/s by dtype."""
    bytes_per_second: float


@dataclass(frozen=True)
class BenchmarkResults:
    """Speed of teacher and student, which took turns request by request."""

    machine: MachineRates
    rows: list[BenchmarkRow]
    speedups: list[Speedup]

    def engine_speedups(self) -> list[Speedup]:
        """Returns the speed-ups of engines; those of the baseline if there is no engine."""
        return [s for s in self.speedups if s.backend != BASELINE] or self.speedups

    def teacher_precision(self, backend: str) -> str:
        """Returns the teacher's precision, from which that of a quantized student differs."""
        teachers = (row for row in self.rows if row.role == "teacher" and row.backend == backend)
        return next(teachers).precision


@dataclass(frozen=True)
class EngineQuality:
    """Quality of an engine and of its source model on the same held-out sequences."""

    engine: TextQuality
    source: TextQuality
    sequences: int
    tokens: int
    """Tokens in all sequences."""
    predictions: int
    """Next-token predictions in the loss."""
    loss_difference: Difference
    """Engine minus source, paired by sequence."""

    def served_text(self) -> ServedText:
        """Returns the comparison as a ``ServedText``, in which the source is the student."""
        perplexities = self.source.perplexity, self.engine.perplexity
        return ServedText(*perplexities, self.loss_difference, self.sequences, self.predictions)


@dataclass(frozen=True)
class EngineComparison:
    """Comparison of an engine with its source model."""

    max_logit_difference: float
    greedy_margin: float
    """Largest gap, in the source model's logits, between its best token and a generated token."""
    weight_types: dict[str, int]
    """Number of weights by stored data type."""
    quality: EngineQuality | None
    """``None`` without held-out text."""


@dataclass(frozen=True)
class EngineResult:
    """A built engine, compared with its source model if the backend returns logits.

    The last four fields are those of the ``EngineComparison``; ``None`` if there is none.
    """

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
    """A quantized Hugging Face folder."""

    quant_algo: str
    quality: QuantizationQuality
