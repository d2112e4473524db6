"""Results of evaluations on text and benchmarks, and paired comparisons of models. Torch-free.

Models are compared item by item. They mostly fail on the same questions, so the mean of the paired
differences has a narrower interval than the difference of two separate means.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from recipes.core.precision import dtype_name
from recipes.core.statistics import Difference, difference, standard_error

ROLES = ("teacher", "pruned", "distilled")
ANSWER_METRIC = "log-likelihood of the right answer"


@dataclass(frozen=True)
class TextQuality:
    """Metrics of a model, as means over sequences of text; loss and KL in nats."""

    loss: float
    loss_standard_error: float | None
    """``None`` for a single sequence."""
    perplexity: float
    kl_to_teacher: float
    top1_agreement: float


@dataclass(frozen=True)
class TokenQuality:
    """Metrics of a student, as means over all predictions; KL in nats."""

    perplexity: float
    kl_to_teacher: float


@dataclass(frozen=True)
class ModelQuality(TextQuality):
    """Metrics of a model on all held-out text."""

    parameters: int


@dataclass(frozen=True)
class SourceQuality:
    """Quality of all models on the sequences of one source."""

    teacher: TextQuality
    pruned: TextQuality
    distilled: TextQuality
    sequences: int
    tokens: int
    predictions: int
    recovered: float | None


@dataclass(frozen=True)
class EvaluationResult:
    """Quality of all models on the same held-out sequences."""

    teacher: ModelQuality
    pruned: ModelQuality
    distilled: ModelQuality
    sequences: int
    tokens: int
    predictions: int
    """Number of next-token predictions in the loss. The first tokens of sequences and documents are
    not predicted, and of conversations only the assistant's answers are."""
    recovered: float | None
    """(pruned loss - distilled loss) / (pruned loss - teacher's loss); see ``recovered``."""
    sources: dict[str, SourceQuality] = field(default_factory=dict)
    """Quality by text source; empty if there is only one source."""
    precision: str = "32"
    """Precision of the weights and the computation."""

    @property
    def dtype_name(self) -> str:
        """Name of the precision's dtype, such as float32."""
        return dtype_name(self.precision)

    def models(self) -> dict[str, ModelQuality]:
        """Returns the quality of each model by its role."""
        return {role: getattr(self, role) for role in ROLES}


@dataclass(frozen=True)
class Item:
    """An item of a benchmark with a model's response and metrics."""

    id: str
    hash: str
    """Hash of the item's content and prompt."""
    doc: object
    target: object
    response: object
    """For each choice, its log-likelihood and whether it is the greedy one; or generated text."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class Score:
    """A model's mean metric over a task's items."""

    value: float
    standard_error: float | None
    """``None`` for a single item."""


@dataclass(frozen=True)
class Differences:
    """Paired differences to the teacher, with 95% intervals."""

    distilled: Difference
    pruned: Difference


@dataclass(frozen=True)
class TaskScores:
    """Scores of all models on the same items."""

    metric: str
    items: int
    teacher: Score
    pruned: Score
    distilled: Score
    differences: Differences
    recovered: float | None
    """(distilled - pruned) / (teacher - pruned), of the scores; see the function ``recovered``."""

    def models(self) -> dict[str, Score]:
        """Returns the score of each model by its role."""
        return {role: getattr(self, role) for role in ROLES}

    @property
    def is_fraction(self) -> bool:
        """Whether the scores are fractions of the items, as accuracy is."""
        return all(0 <= score.value <= 1 for score in self.models().values())


@dataclass(frozen=True)
class TaskResult(TaskScores):
    """Scores of all models in one benchmark."""

    version: str
    split: str
    """Split of the benchmark with the items."""
    num_fewshot: int
    """Number of examples before each question."""
    data: str
    """Source of the items."""
    seconds: dict[str, float]
    """Time of each model's answers, by role or ``step N``."""
    answers: TaskScores | None = None
    """Log-likelihoods of the right answers; see ``compare_answers``."""
    steps: dict[int, Score] = field(default_factory=dict)
    """Scores of the student as saved during training, by training step."""


@dataclass(frozen=True)
class TaskResults:
    """Scores of all models in all benchmarks."""

    tasks: dict[str, TaskResult]
    cached: dict[str, list[str]]
    """Tasks whose answers were in the cache, by role or ``step N``."""
    harness: str
    """Name and version of lm-eval, and the dtype of the models."""

    @property
    def data(self) -> str:
        """Sources of the items."""
        return ", ".join(dict.fromkeys(task.data for task in self.tasks.values()))

    def fractions(self) -> list[str]:
        """Returns the names of the tasks whose scores are fractions, such as accuracy."""
        return [name for name, task in self.tasks.items() if task.is_fraction]

    def means(self, names: Collection[str] | None = None) -> dict[str, float]:
        """Returns each model's mean score over the named tasks; by default over all.

        Tasks whose scores are not fractions, such as perplexity, are left out.
        """
        used = [self.tasks[name] for name in self.fractions() if names is None or name in names]
        if not used:
            return {}
        return {role: fmean([task.models()[role].value for task in used]) for role in ROLES}


@dataclass(frozen=True)
class ServedScores:
    """Scores of the student and of the model that is served, on the same items."""

    metric: str
    items: int
    student: Score
    served: Score
    difference: Difference
    """Served minus student, paired by item, with a 95% interval."""

    @property
    def is_fraction(self) -> bool:
        """Whether the scores are fractions of the items, as accuracy is."""
        return 0 <= self.student.value <= 1 and 0 <= self.served.value <= 1


@dataclass(frozen=True)
class ServedTask(ServedScores):
    """Scores in one benchmark."""

    answers: ServedScores | None = None
    """Log-likelihoods of the right answers; see ``compare_answers``."""


@dataclass(frozen=True)
class ServedText:
    """Perplexity of the student and of the model that is served, on the same sequences."""

    student_perplexity: float
    served_perplexity: float
    loss_difference: Difference
    """Served minus student, in nats, paired by sequence."""
    sequences: int
    predictions: int

    @classmethod
    def of(cls, served: Sequence[float], student: Sequence[float], predictions: int) -> ServedText:
        """Compares the models by their mean loss on each sequence."""
        of_student, of_served = (math.exp(fmean(losses)) for losses in (student, served))
        return cls(of_student, of_served, difference(served, student), len(served), predictions)


PROGRAMS = {
    "llama_cpp": "llama.cpp",
    "openvino": "OpenVINO",
    "tensorrt_llm": "TensorRT-LLM",
    "tensorrt_llm_pytorch": "TensorRT-LLM's PyTorch backend",
}
"""Display names of the programs that run a built model; keys are ``ServedResult.server``."""


@dataclass(frozen=True)
class ServedResult:
    """Quality of the model that is served, compared with the student that it was built from."""

    server: str
    """``llama_cpp``, or the engine's backend."""
    precision: str
    """Data type of the served weights."""
    tasks: dict[str, ServedTask]
    text: ServedText | None
    """``None`` if there is no held-out text, or if the server returns no log-probabilities."""
    harness: str
    data: str

    @property
    def program(self) -> str:
        """Name of the program that runs the model."""
        return PROGRAMS[self.server]


def compare_served(metric: str, items: Mapping[str, Sequence[Item]]) -> ServedTask:
    """Compares the served model with the student by a metric. ``items`` has both models' items."""
    scores = {role: [i.metrics[metric] for i in items[role]] for role in ("student", "served")}
    answers = {role: answer_values(items[role]) for role in scores}
    scored = [values for values in answers.values() if values is not None]
    return ServedTask(
        **vars(_compare_served(metric, *scores.values())),
        answers=_compare_served(ANSWER_METRIC, *scored) if len(scored) == len(answers) else None,
    )


def _compare_served(metric: str, student: Sequence[float], served: Sequence[float]) -> ServedScores:
    student_score, served_score = (Score(fmean(v), standard_error(v)) for v in (student, served))
    gap = difference(served, student)
    return ServedScores(metric, len(student), student_score, served_score, gap)


def recovered(
    teacher: Sequence[float], pruned: Sequence[float], distilled: Sequence[float]
) -> float | None:
    """Returns (distilled - pruned) / (teacher - pruned): how much distillation recovered.

    Args:
        teacher: A value for each item; higher is better, so losses must be negated.
        pruned: Values of the pruned model on the same items.
        distilled: Values of the distilled model on the same items.

    Returns:
        0 if the distilled model equals the pruned model, and 1 if it equals the teacher. ``None``
        if pruning lost nothing significant: the 95% interval of the paired difference includes 0.
    """
    change = difference(pruned, teacher)
    if not change.is_negative:
        return None
    return (fmean(distilled) - fmean(pruned)) / -change.value  # ``change`` is negative


def score_of(metric: str, items: Sequence[Item]) -> Score:
    """Returns a model's mean score and its standard error, by a metric of the items."""
    values = [item.metrics[metric] for item in items]
    return Score(fmean(values), standard_error(values))


def compare_scores(metric: str, items: Mapping[str, Sequence[Item]]) -> TaskScores:
    """Compares models by a metric. Each role has the same items in the same order."""
    return _compare_values(
        metric, {role: [i.metrics[metric] for i in items[role]] for role in ROLES}
    )


def compare_answers(items: Mapping[str, Sequence[Item]]) -> TaskScores | None:
    """Compares models by the log-likelihoods of the right answers, in nats.

    On the same number of items, log-likelihoods reveal smaller differences than accuracy does. They
    are not normalised over the choices, which would make them as noisy as accuracy.

    Returns:
        ``None`` if the log-likelihoods of the right answers are not known, see ``answer_values``.
    """
    values = {role: answer_values(items[role]) for role in ROLES}
    scored = {role: row for role, row in values.items() if row is not None}
    return _compare_values(ANSWER_METRIC, scored) if len(scored) == len(ROLES) else None


def answer_values(items: Sequence[Item]) -> list[float] | None:
    """Returns log-likelihoods of the right answers.

    Returns:
        ``None`` if the model generates its answers, or if an item does not have one right choice.
    """
    values = []
    for item in items:
        responses = item.response if isinstance(item.response, list) else []
        if isinstance(item.target, int):
            response = responses[item.target] if responses else None
        else:  # the target is text, and only the right answer was scored
            response = responses[0] if len(responses) == 1 else None
        if not isinstance(response, list):
            return None
        values.append(float(response[0]))  # the second value says whether it is the greedy choice
    return values


def _compare_values(metric: str, values: Mapping[str, Sequence[float]]) -> TaskScores:
    teacher, pruned, distilled = (values[role] for role in ROLES)
    return TaskScores(
        metric,
        len(teacher),
        **{
            role: Score(fmean(role_values), standard_error(role_values))
            for role, role_values in values.items()
        },
        differences=Differences(difference(distilled, teacher), difference(pruned, teacher)),
        recovered=recovered(teacher, pruned, distilled),
    )


@dataclass(frozen=True)
class SizeQuality(ModelQuality):
    """Metrics of a student with some added layers of its teacher, on held-out text."""

    sources: dict[str, TextQuality]
    """Metrics by source of the text."""


@dataclass(frozen=True)
class AddLayersResult:
    """A student with added layers of its teacher, and the quality of all other numbers of them."""

    kept_layers: list[int]
    """``KeptLayers`` of the model, with the added layers."""
    added_layers: list[int]
    """The teacher's layers that were added, without training."""
    sizes: dict[int, SizeQuality]
    """All models from the student to one layer less than the teacher, by number of layers."""
    teacher_layers: int
    teacher_parameters: int
    tokens: int
    """Tokens of the held-out text."""
