"""What engines are and how fast they run. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.evaluation.results import TextQuality


@dataclass(frozen=True)
class Spread:
    """Of several repetitions."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class BenchmarkRow:
    """One model in one form on requests of one shape; memory and sizes in bytes."""

    role: str
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
        """Backend and precision, which rows differ in besides their setting."""
        return f"{self.backend} {self.precision}"

    @property
    def setting(self) -> tuple[int, int]:
        """Batch and prompt."""
        return self.batch_size, self.prompt_tokens

    @property
    def decode_latency_ms(self) -> float | None:
        """For one more token of one sequence alone, from the median rate."""
        return 1000 / self.decode_tokens_per_second.median if self.batch_size == 1 else None


@dataclass(frozen=True)
class Speedup:
    """How much faster the student is than the teacher, and how much the machine would allow."""

    backend: str
    precision: str
    batch_size: int
    prompt_tokens: int
    prefill: float
    prefill_roofline: float
    decode: float
    decode_roofline: float


@dataclass(frozen=True)
class MachineRates:
    """The machine, and what it can do at best."""

    cpu: str
    """Name of the processor, or of the GPU that does the work."""
    threads: int
    flops_per_second: dict[str, float]
    """By type."""
    bytes_per_second: float


@dataclass(frozen=True)
class BenchmarkResults:
    """Teacher and student in turn."""

    machine: MachineRates
    rows: list[BenchmarkRow]
    speedups: list[Speedup]


@dataclass(frozen=True)
class EngineQuality:
    """An engine and its source on the same held-out windows."""

    engine: TextQuality
    source: TextQuality
    windows: int
    tokens: int
    """That were read."""
    predictions: int
    """Of a next token that results are means of."""


@dataclass(frozen=True)
class EngineComparison:
    """An engine against the model that it was built from."""

    max_logit_difference: float
    greedy_margin: float
    weight_types: dict[str, int]
    """Stored values by type."""
    quality: EngineQuality | None
    """``None`` where there was no text to measure it on."""


@dataclass(frozen=True)
class EngineResult:
    """What was built; what compares it with its source is missing where its logits are hidden."""

    backend: str
    precision: str
    group_size: int | None
    build_seconds: float
    bytes: int
    max_logit_difference: float | None = None
    greedy_margin: float | None = None
    weight_types: dict[str, int] | None = None
    quality: EngineQuality | None = None


@dataclass(frozen=True)
class QuantizationQuality:
    """A model before and after, on the same held-out windows."""

    source: TextQuality
    quantized: TextQuality


@dataclass(frozen=True)
class QuantizationResult:
    """A quantised folder."""

    quant_algo: str
    quality: QuantizationQuality
