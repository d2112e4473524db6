"""Settings of the stages of a search. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated

from omegaconf import MISSING

from nemo_convert.architecture import Architecture
from recipes.core.constraints import Count, CountOrZero, Threads, Tokens, integer, one_of
from recipes.core.precision import Precision
from recipes.core.stage import Inputs, StageConfig
from recipes.distillation.settings import DistillConfig
from recipes.engines.settings import BuildEngineConfig
from recipes.engines.timing import RequestShape
from recipes.pruning.settings import LAYER_METHODS
from recipes.search.results import LatencyResult
from recipes.search.space import Budget, Service, Space, enumerate_shapes

PROXIES = ("kl_to_teacher", "perplexity")
SHAPES_FILE = "shapes.json"


@dataclass
class EnumerateShapesConfig(StageConfig):
    """Settings of ``enumerate_shapes``."""

    hf_path: str = MISSING
    """Folder, hub id, or ``pypi://`` source of the teacher."""
    budget: Budget = field(default_factory=Budget)
    """What a shape may cost."""
    space: Space = field(default_factory=Space)
    """What may become smaller."""
    service: Service = field(default_factory=Service)
    """How it is to be served."""

    def shapes(self, teacher: Architecture) -> list[Architecture]:
        """Shapes within the budget, the largest first."""
        return enumerate_shapes(teacher, self.space, self.budget.limits(), self.service)

    def as_measured(self, inputs: Inputs) -> EnumerateShapesConfig:
        """This, with latency as it was measured, where it was."""
        if "latency" not in inputs:
            return self
        line = inputs["latency"].manifest.result(LatencyResult).measured
        return replace(self, service=replace(self.service, measured=line))


@dataclass
class MeasureLatencyConfig(StageConfig):
    """Settings of ``measure_latency``."""

    engine: BuildEngineConfig = field(
        default_factory=lambda: BuildEngineConfig(stage="build_engine")
    )
    """How engines are built."""
    space: Space = field(default_factory=Space)
    """What may become smaller, as in the search."""
    service: Service = field(default_factory=Service)
    """Batch and context that a step is timed at; this and the space are put in from the search."""
    new_tokens: Annotated[int, integer(2)] = 32
    """Tokens that are written, whose mean time is a step's."""
    repetitions: Count = 3
    """Measured runs of every shape, after one that warms up."""
    threads: Threads | None = None
    """CPU threads; by default those that the launcher gives to a process."""

    def request(self) -> RequestShape:
        """What is timed: its steps see the service's context on average."""
        prompt = self.service.context_length - self.new_tokens // 2
        return RequestShape(self.service.batch_size, prompt, self.new_tokens)


@dataclass
class RankCandidatesConfig(StageConfig):
    """Settings of ``rank_candidates``."""

    proxy: Annotated[str, one_of(*PROXIES)] = "kl_to_teacher"
    """``kl_to_teacher`` or ``perplexity`` without training; the lower, the better."""
    num_healed: CountOrZero = 8
    """So many of the best as cut are healed, and ranked before all others by what they are then, as
    training would more likely have them (docs/results.md)."""
    num_calibration_samples: Count = 16
    """Windows of the calibration part to heal on."""
    layer_importance: Annotated[str, one_of(*LAYER_METHODS)] = "loss"
    """As in ``prune``."""
    num_samples: Count = 8
    """Windows of ``seq_length`` tokens from the validation part."""
    seq_length: Count = 256
    """Tokens of a window."""
    precision: Precision = "32"
    """As in ``evaluate``."""
    micro_batch_size: Count = field(default=4, metadata={"resource": True})
    """Windows that are held at once."""


@dataclass
class SuccessiveHalvingConfig(StageConfig):
    """Settings of ``successive_halving``."""

    num_candidates: Count = 4
    """Best-ranked candidates that take part; the number left is halved each round. One alone wins
    by its rank, untrained."""
    also: list[str] = field(default_factory=list)
    """Names of candidates that take part, too, whatever their rank."""
    max_tokens: Tokens = 200_000
    """Tokens that all trainings together may use."""
    select_by: Annotated[str, one_of(*PROXIES)] = "kl_to_teacher"
    """``kl_to_teacher`` or ``perplexity`` on validation text; the lower, the better."""
    num_samples: Count = 16
    """Windows of validation text that each is measured on after a round."""
    precision: Precision = "32"
    """What they are measured in, as in ``evaluate``."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """How candidates are trained; steps follow from the tokens."""

    def rounds(self, count: int) -> list[int]:
        """Candidates in each round, of so many in the first."""
        numbers = []
        while count > 1:
            numbers.append(count)
            count = math.ceil(count / 2)
        return numbers

    def most(self) -> int:
        """Candidates in the first round, should no name in ``also`` be among the best anyway."""
        return self.num_candidates + len(set(self.also))

    def steps(self, candidates: int, rounds: int) -> int:
        """Steps that each of so many candidates may take in one of so many rounds."""
        tokens = self.max_tokens / rounds / candidates
        return int(tokens / (self.distill.global_batch_size * self.distill.seq_length))
