"""Results of evaluations: quality on text, and scores in benchmarks. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from recipes.core.precision import dtype_name
from recipes.core.statistics import Difference

ROLES = ("teacher", "pruned", "distilled")


@dataclass(frozen=True)
class TextQuality:
    """Metrics of a model on sequences of text; loss and KL in nats."""

    loss: float
    loss_standard_error: float
    perplexity: float
    kl_to_teacher: float
    top1_agreement: float


@dataclass(frozen=True)
class TokenQuality:
    """Metrics of a model as means over all predictions; KL in nats."""

    perplexity: float
    kl_to_teacher: float


@dataclass(frozen=True)
class ModelQuality(TextQuality):
    """Metrics of a model on all held-out text."""

    parameters: int


@dataclass(frozen=True)
class SourceQuality:
    """All models on the sequences of one source."""

    teacher: TextQuality
    pruned: TextQuality
    distilled: TextQuality
    sequences: int
    tokens: int
    predictions: int
    recovered: float | None


@dataclass(frozen=True)
class EvaluationResult:
    """All models on the same held-out sequences."""

    teacher: ModelQuality
    pruned: ModelQuality
    distilled: ModelQuality
    sequences: int
    tokens: int
    predictions: int
    """Next-token predictions that count: not of a sequence's first token or a document's first."""
    recovered: float | None
    """Fraction of the loss added by pruning that distillation removed; see ``paired``."""
    sources: dict[str, SourceQuality] = field(default_factory=dict)
    """By source of the text, where there is more than one."""
    precision: str = "32"
    """Of the weights and the computation."""

    @property
    def dtype_name(self) -> str:
        """The precision's name for people."""
        return dtype_name(self.precision)

    def models(self) -> dict[str, ModelQuality]:
        """Returns every model by its role."""
        return {role: getattr(self, role) for role in ROLES}


@dataclass(frozen=True)
class Item:
    """An item of a benchmark with a model's response and metrics."""

    id: str
    hash: str
    """Of its content and prompt."""
    doc: object
    target: object
    response: object
    """Log-likelihoods, or text."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class Score:
    """A model's mean over a task's items."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Differences:
    """Paired differences to the teacher, with 95% intervals."""

    distilled: Difference
    pruned: Difference


@dataclass(frozen=True)
class TaskScores:
    """All models on the same items."""

    metric: str
    items: int
    teacher: Score
    pruned: Score
    distilled: Score
    differences: Differences
    recovered: float | None
    """Fraction of the score lost by pruning that distillation recovered; see ``paired``."""

    def models(self) -> dict[str, Score]:
        """Returns every model by its role."""
        return {role: getattr(self, role) for role in ROLES}

    @property
    def has_fractions(self) -> bool:
        """Whether the scores are fractions of the items, as accuracy is."""
        return all(0 <= score.value <= 1 for score in self.models().values())


@dataclass(frozen=True)
class TaskResult(TaskScores):
    """All models in one benchmark."""

    version: str
    seconds: dict[str, float]
    """By role, for its answers."""
    answers: TaskScores | None = None
    """Log-likelihoods of the right answers, see ``paired.compare_answers``."""


@dataclass(frozen=True)
class TaskResults:
    """All models in all benchmarks."""

    tasks: dict[str, TaskResult]
    cached: dict[str, list[str]]
    """By role, the tasks whose answers were in the cache."""
    harness: str
    data: str

    def means(self) -> dict[str, float]:
        """Returns each model's mean over the tasks whose scores are fractions."""
        fractions = [task.models() for task in self.tasks.values() if task.has_fractions]
        if not fractions:
            return {}
        return {role: fmean([task[role].value for task in fractions]) for role in ROLES}
