"""Settings of the stages of a search. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated

from omegaconf import MISSING

from nemo_convert.architecture import Architecture
from recipes.core.constraints import Count, CountOrZero, Threads, Tokens, integer, one_of
from recipes.core.precision import Precision
from recipes.core.stage import InferenceConfig, Inputs, StageConfig
from recipes.distillation.settings import DistillConfig
from recipes.engines.settings import BuildEngineConfig
from recipes.engines.timing import RequestShape
from recipes.pruning.settings import LAYER_METHODS
from recipes.search.results import LatencyResult
from recipes.search.space import Budget, Service, Space, enumerate_shapes

PROXIES = ("kl_to_teacher", "perplexity")
"""Metrics that can rank candidates."""
SHAPES_FILE = "shapes.json"


@dataclass
class EnumerateShapesConfig(StageConfig):
    """Settings of ``enumerate_shapes``."""

    hf_path: str = field(default=MISSING, metadata={"path": True})
    """Folder, hub id, or ``pypi://`` source of the teacher."""
    budget: Budget = field(default_factory=Budget)
    """Limits of a shape's costs."""
    space: Space = field(default_factory=Space)
    """Axes that may be pruned, and how far."""
    service: Service = field(default_factory=Service)
    """How the student is served."""

    def shapes(self, teacher: Architecture) -> list[Architecture]:
        """Returns the shapes that fit the budget and cannot grow on any axis, the largest first."""
        return enumerate_shapes(teacher, self.space, self.budget.limits(), self.service)

    def with_measured_latency(self, inputs: Inputs) -> EnumerateShapesConfig:
        """Returns these settings with the latency model of the input ``latency``, if it exists."""
        if "latency" not in inputs:
            return self
        latency_model = inputs["latency"].manifest.result(LatencyResult).measured
        return replace(self, service=replace(self.service, measured=latency_model))


@dataclass
class MeasureLatencyConfig(StageConfig):
    """Settings of ``measure_latency``; ``space`` and ``service`` come from ``enumerate_shapes``."""

    engine: BuildEngineConfig = field(
        default_factory=lambda: BuildEngineConfig(stage="build_engine")
    )
    """How engines are built."""
    space: Space = field(default_factory=Space)
    """The latency model is fitted to the corners of this space: the teacher, and shapes with one
    axis or all axes at the minimum. A shape in the middle is timed to check the latency model."""
    service: Service = field(default_factory=Service)
    """How the student is served. Timed steps have this batch size and context length."""
    new_tokens: Annotated[int, integer(least=2)] = 32
    """Number of generated tokens; the time of a step is the mean over them."""
    repetitions: Count = 3
    """Measured runs of every shape, after one warm-up run."""
    threads: Threads | None = None
    """CPU threads; by default those that the launcher gives to a process."""

    def request(self) -> RequestShape:
        """Returns the timed request."""
        # The mean context of the decoding steps is the context length of the service.
        prompt = self.service.context_length - self.new_tokens // 2
        return RequestShape(self.service.batch_size, prompt, self.new_tokens)


@dataclass
class RankCandidatesConfig(InferenceConfig):
    """Settings of ``rank_candidates``."""

    proxy: Annotated[str, one_of(*PROXIES)] = "kl_to_teacher"
    """Metric that ranks the untrained candidates, and by which ``successive_halving`` chooses
    among the trained ones: ``kl_to_teacher`` or ``perplexity``; lower is better."""
    num_healed: CountOrZero = 8
    """Number of shapes, the best by ``proxy``, that are also healed: their weights are adjusted by
    least squares. They rank before all other shapes, by ``proxy`` after healing, which predicts
    the order after training better than ``proxy`` before healing (docs/results.md)."""
    num_calibration_samples: Count = 16
    """Calibration sequences for healing."""
    layer_importance: Annotated[str, one_of(*LAYER_METHODS)] = "loss"
    """How layers to drop are chosen; ``prune`` explains the values and must have the same one."""
    num_samples: Count = 8
    """Validation sequences of ``seq_length`` tokens."""


@dataclass
class SuccessiveHalvingConfig(StageConfig):
    """Settings of ``successive_halving``."""

    num_candidates: Count = 4
    """Number of best-ranked candidates in the first round. Every round drops half of them.
    If there is only one candidate, it is chosen without training."""
    also: list[str] = field(default_factory=list)
    """Names of candidates that join the best-ranked ones in the first round."""
    max_tokens: Tokens = 200_000
    """Number of tokens of all training runs together."""
    num_samples: Count = 16
    """Validation sequences on which candidates are measured after a round."""
    precision: Precision = "32"
    """Precision of these measurements."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """How candidates are trained; the number of steps follows from ``max_tokens``."""
    hardware: str = field(default="cpu", metadata={"resource": True})
    """Hardware profile of the recipe that the stage writes for the chosen candidate."""

    def round_sizes(self, candidates: int) -> list[int]:
        """Returns the number of candidates in each round, starting with ``candidates``."""
        counts = []
        while candidates > 1:
            counts.append(candidates)
            candidates = math.ceil(candidates / 2)
        return counts

    def max_candidates(self) -> int:
        """Returns the largest possible number of candidates in the first round."""
        return self.num_candidates + len(set(self.also))

    def steps(self, candidates: int, num_rounds: int) -> int:
        """Returns the training steps of one candidate in a round with ``candidates`` candidates."""
        # All rounds have the same number of tokens, and so do the candidates of a round.
        tokens = self.max_tokens / num_rounds / candidates
        return int(tokens / (self.distill.global_batch_size * self.distill.seq_length))
