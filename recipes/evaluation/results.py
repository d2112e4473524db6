"""What evaluations find: quality on text, and scores in tasks. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.core.precision import number_type
from recipes.core.statistics import Difference

ROLES = ("teacher", "pruned", "distilled")


@dataclass(frozen=True)
class TextQuality:
    """A model on windows of text; losses and divergences in nats."""

    loss: float
    loss_standard_error: float
    perplexity: float
    kl_to_teacher: float
    top1_agreement: float


@dataclass(frozen=True)
class TokenQuality:
    """A model beside the teacher, by means over all predictions; the divergence in nats."""

    perplexity: float
    kl_to_teacher: float


@dataclass(frozen=True)
class ModelQuality(TextQuality):
    """A model on all of the held-out text."""

    parameters: int


@dataclass(frozen=True)
class SourceQuality:
    """All models on the windows of one source."""

    teacher: TextQuality
    pruned: TextQuality
    distilled: TextQuality
    windows: int
    tokens: int
    """That were read."""
    predictions: int
    """As of the whole."""
    recovered: float | None
    """Share of the loss that pruning added and distillation took away; see ``paired``."""


@dataclass(frozen=True)
class EvaluationResult:
    """All models on the same held-out windows."""

    teacher: ModelQuality
    pruned: ModelQuality
    distilled: ModelQuality
    windows: int
    tokens: int
    """That were read."""
    predictions: int
    """Of a next token that results are means of: all but a sequence's first, and those that follow
    a document."""
    recovered: float | None
    """Share of the loss that pruning added and distillation took away; see ``paired``."""
    sources: dict[str, SourceQuality] = field(default_factory=dict)
    """By source of the text, where there is more than one."""
    precision: str = "32"
    """What the models were held and computed in."""

    @property
    def number_type(self) -> str:
        """The precision's name for people."""
        return number_type(self.precision)

    def models(self) -> dict[str, ModelQuality]:
        """Every model by its role."""
        return {"teacher": self.teacher, "pruned": self.pruned, "distilled": self.distilled}


@dataclass(frozen=True)
class Item:
    """An item of a task, and what a model made of it."""

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
    """Share of the score that pruning cost and distillation won back; see ``paired``."""

    def models(self) -> dict[str, Score]:
        """Every model by its role."""
        return {"teacher": self.teacher, "pruned": self.pruned, "distilled": self.distilled}

    @property
    def is_share(self) -> bool:
        """Whether the scores are shares of the items, as an accuracy is."""
        return all(0 <= score.value <= 1 for score in self.models().values())


@dataclass(frozen=True)
class TaskResult(TaskScores):
    """A task as it was asked."""

    version: str
    seconds: dict[str, float]
    """That each model's answers took."""
    answers: TaskScores | None = None
    """Log-likelihoods of the right answers, see ``paired.answers``; ``None`` where answers are
    written freely."""


@dataclass(frozen=True)
class TaskResults:
    """All models in all tasks."""

    tasks: dict[str, TaskResult]
    cached: dict[str, list[str]]
    """Tasks that each model had answered before."""
    harness: str
    data: str

    def means(self) -> dict[str, float]:
        """Each model's mean over the tasks that are shares; every task counts the same."""
        shares = [task.models() for task in self.tasks.values() if task.is_share]
        if not shares:
            return {}
        return {role: sum(task[role].value for task in shares) / len(shares) for role in ROLES}
