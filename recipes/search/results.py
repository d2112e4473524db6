"""What a search finds: candidates, the one it chose, and latency by shape. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_convert.architecture import Architecture
from recipes.core.files import write_json
from recipes.search.space import LatencyFit

CANDIDATES_FILE = "candidates.json"


@dataclass(frozen=True)
class Candidate:
    """A shape, and what is known of its quality."""

    name: str
    parameters: int
    proxy: float
    """What it was ranked by; the lower, the better."""
    perplexity: float
    kl_to_teacher: float
    healed: bool
    """Whether it was healed before it was measured."""
    tokens: int
    """That it was trained on before it was measured."""
    chosen: bool
    pareto: bool
    """Whether no other beats it in both size and proxy."""
    shape: Architecture


@dataclass(frozen=True)
class SearchResult:
    """Candidates, the best-ranked first."""

    candidates: list[Candidate]
    budget: dict[str, float]
    winner: str | None = None
    """Name of the one that was chosen by training."""

    def chosen(self) -> Candidate | None:
        """The one that was chosen by training."""
        return next((one for one in self.candidates if one.chosen), None)


def write_candidates(out: Path, candidates: Sequence[Candidate]) -> None:
    """Writes them for a person to read, as in the manifest."""
    write_json(out / CANDIDATES_FILE, [asdict(one) for one in candidates])


@dataclass(frozen=True)
class TimedShape:
    """Milliseconds of a decoding step of one shape."""

    name: str
    step_ms: float
    fitted_ms: float
    seen: bool
    """Whether it is a part of the fit."""

    @property
    def error(self) -> float:
        """How far the fitted line is from it, as a share."""
        return self.fitted_ms / self.step_ms - 1


@dataclass(frozen=True)
class TimedEngine:
    """How the timed engines were built."""

    backend: str
    precision: str


@dataclass(frozen=True)
class LatencyResult:
    """A line fitted to timed engines, the first of which is the teacher's."""

    measured: LatencyFit
    threads: int
    engine: TimedEngine
    shapes: list[TimedShape]
