"""Results of a search: candidates and latency by shape. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_convert.architecture import Architecture
from recipes.core.files import json_text, write_text_atomically
from recipes.search.space import LatencyFit

CANDIDATES_FILE = "candidates.json"


@dataclass(frozen=True)
class Candidate:
    """A shape with its measured quality."""

    name: str
    parameters: int
    shape: Architecture
    proxy: float
    """The metric that ranks candidates (``PROXIES``), before any training; lower is better."""
    perplexity: float
    kl_to_teacher: float
    healed: bool = False
    """Whether the pruned weights were adjusted by least squares before ``proxy`` was measured."""
    tokens: int = 0
    """Number of training tokens before ``perplexity`` and ``kl_to_teacher`` were measured."""
    chosen: bool = False
    """Whether ``successive_halving`` chose this candidate: the best after the last round."""
    pareto: bool = False
    """Whether the candidate is on the Pareto front: no other is better in size and ``proxy``. If
    some candidates were healed, only healed candidates can be on the front."""


@dataclass(frozen=True)
class SearchResult:
    """Candidates of a search, and the budget that they fit."""

    candidates: list[Candidate]
    """In the order of ``rank_candidates``. The chosen candidate need not be the first."""
    budget: dict[str, float]
    """Limits by their names in ``Budget``, with fractions multiplied by the teacher's cost."""

    def chosen(self) -> Candidate | None:
        """Returns the candidate that ``successive_halving`` chose; ``None`` before that stage."""
        return next((candidate for candidate in self.candidates if candidate.chosen), None)


def write_candidates(out: Path, candidates: Sequence[Candidate]) -> None:
    """Writes the candidates to a file for people. Stages read candidates from the manifest."""
    text = json_text([asdict(candidate) for candidate in candidates], indent=1)
    write_text_atomically(out / CANDIDATES_FILE, text + "\n")


@dataclass(frozen=True)
class TimedShape:
    """Time of a decoding step of one shape."""

    name: str
    step_ms: float
    """Measured milliseconds."""
    fitted_ms: float
    """Milliseconds by the latency model."""
    is_fitted: bool
    """Whether the latency model was fitted to this shape."""

    @property
    def error(self) -> float:
        """Relative error of the latency model; positive if it predicts too much time."""
        return self.fitted_ms / self.step_ms - 1


@dataclass(frozen=True)
class LatencyResult:
    """Result of ``measure_latency``."""

    measured: LatencyFit
    """The latency model."""
    threads: int
    """CPU threads of each engine."""
    backend: str
    precision: str
    shapes: list[TimedShape]  # the first is the teacher
