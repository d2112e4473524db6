"""Results of evaluations, and paired comparisons of models. Does not import torch.

Models are compared item by item, where an item is a benchmark's question or a sequence of text.
Most models fail on the same items. So the mean of the paired differences has a narrower interval
than the difference of two separate means.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from recipes.core.precision import dtype_name
from recipes.core.statistics import Difference, difference, perplexity, standard_error

ROLES = ("teacher", "pruned", "distilled")
"""Roles of the compared models. ``distilled`` is the student after training."""
ANSWER_METRIC = "log-likelihood of the right answer"


@dataclass(frozen=True)
class TextQuality:
    """Metrics of a model, as means over sequences; loss and KL in nats.

    A sequence's metric is the mean over its next-token predictions.
    """

    loss: float
    loss_standard_error: float | None
    """``None`` for a single sequence."""
    perplexity: float
    """exp(loss)."""
    kl_to_teacher: float
    top1_agreement: float
    """Fraction of positions at which model and teacher have the same most likely token."""


@dataclass(frozen=True)
class TokenQuality:
    """Metrics of a student, as means over the predictions of all sequences; KL in nats."""

    perplexity: float
    kl_to_teacher: float


@dataclass(frozen=True)
class ModelQuality(TextQuality):
    """Metrics of a model on held-out text, and its number of parameters."""

    parameters: int


@dataclass(frozen=True)
class SourceQuality:
    """The fields of ``EvaluationResult``, for the sequences of one source."""

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
    not predicted. In conversations, only the assistant's answers are predicted."""
    recovered: float | None
    """(pruned - distilled) / (pruned - teacher), of losses; ``None`` if pruning lost too little."""
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
    """Hashes of the item's content, prompt and target, which lm-eval computes."""
    doc: object
    """The item's record in the data set."""
    target: object
    """Index of the right choice, or the right answer as text."""
    response: object
    """A list: ``[log-likelihood, is greedy]`` of each choice, or only the generated text."""
    metrics: dict[str, float]
    """Values of the item by metric, such as 0 or 1 for ``acc``."""


@dataclass(frozen=True)
class Score:
    """A model's mean metric over a task's items."""

    value: float
    standard_error: float | None
    """``None`` for a single item."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        """Computes the score from each item's value of the metric."""
        return cls(fmean(values), standard_error(values))


@dataclass(frozen=True)
class Differences:
    """Paired differences: a model's scores minus the teacher's, with 95% intervals."""

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
    """(distilled - pruned) / (teacher - pruned), of means; ``None`` if pruning lost too little."""

    def models(self) -> dict[str, Score]:
        """Returns the score of each model by its role."""
        return {role: getattr(self, role) for role in ROLES}

    @property
    def is_fraction(self) -> bool:
        """Whether all scores are between 0 and 1, such as accuracy."""
        return all(0 <= score.value <= 1 for score in self.models().values())


@dataclass(frozen=True)
class TaskResult(TaskScores):
    """Scores of all models in one benchmark."""

    version: str
    """Version of lm-eval's task."""
    split: str
    """Split of the data set that has the items."""
    num_fewshot: int
    """Number of examples before each question."""
    data: str
    """Source of the items."""
    seconds: dict[str, float]
    """Seconds that each model took to answer, by role or ``step N``; cached with the answers."""
    answers: TaskScores | None = None
    """Comparison by the log-likelihoods of the right answers; see ``compare_answers``."""
    steps: dict[int, Score] = field(default_factory=dict)
    """Scores of the student's checkpoints that were saved during training, by training step."""


@dataclass(frozen=True)
class TaskResults:
    """Scores of all models in all benchmarks."""

    tasks: dict[str, TaskResult]
    cached: dict[str, list[str]]
    """Names of the tasks whose answers were in the cache, by role or ``step N``."""
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
        """Returns each model's mean score over the named tasks; by default over all tasks.

        Tasks whose scores are not fractions are left out. Without tasks, the result is empty.
        """
        tasks = [self.tasks[name] for name in self.fractions() if names is None or name in names]
        if not tasks:
            return {}
        return {role: fmean([task.models()[role].value for task in tasks]) for role in ROLES}


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
        """Whether both scores are between 0 and 1, such as accuracy."""
        return 0 <= self.student.value <= 1 and 0 <= self.served.value <= 1


@dataclass(frozen=True)
class ServedTask(ServedScores):
    """Scores of the student and of the model that is served, in one benchmark."""

    answers: ServedScores | None = None
    """Comparison by the log-likelihoods of the right answers; ``None`` if they are not known."""


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
        """Compares the models by their mean loss on each sequence, in nats."""
        return cls(
            student_perplexity=perplexity(fmean(student)),
            served_perplexity=perplexity(fmean(served)),
            loss_difference=difference(served, student),
            sequences=len(served),
            predictions=predictions,
        )


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
    """Name and version of lm-eval, and the dtype of the student."""
    data: str
    """Sources of the items."""

    @property
    def program(self) -> str:
        """Name of the program that runs the model."""
        return PROGRAMS[self.server]


def compare_served(metric: str, items: Mapping[str, Sequence[Item]]) -> ServedTask:
    """Compares the models ``student`` and ``served``, which are the keys of ``items``."""
    student, served = items["student"], items["served"]
    scores = _served_scores(metric, metric_values(metric, student), metric_values(metric, served))
    student_answers, served_answers = answer_values(student), answer_values(served)
    answers = None
    if student_answers is not None and served_answers is not None:
        answers = _served_scores(ANSWER_METRIC, student_answers, served_answers)
    return ServedTask(**vars(scores), answers=answers)  # has the fields of ``scores``, too


def _served_scores(metric: str, student: Sequence[float], served: Sequence[float]) -> ServedScores:
    change = difference(served, student)
    return ServedScores(metric, len(student), Score.of(student), Score.of(served), change)


def recovered(
    teacher: Sequence[float], pruned: Sequence[float], distilled: Sequence[float]
) -> float | None:
    """Returns the fraction of the quality lost by pruning that distillation recovered.

    The fraction is (distilled - pruned) / (teacher - pruned), of means over items. It is ``None``
    if pruning lost nothing significant: the 95% interval of pruned minus teacher reaches 0. The
    arguments are values of the same items, where higher is better. So callers negate losses.
    """
    pruned_minus_teacher = difference(pruned, teacher)
    if not pruned_minus_teacher.is_negative:
        return None
    return (fmean(distilled) - fmean(pruned)) / -pruned_minus_teacher.value


def metric_values(metric: str, items: Sequence[Item]) -> list[float]:
    """Returns the value of a metric for each item."""
    return [item.metrics[metric] for item in items]


def score_of(metric: str, items: Sequence[Item]) -> Score:
    """Returns a model's score: the mean of a metric over the items."""
    return Score.of(metric_values(metric, items))


def compare_scores(metric: str, items: Mapping[str, Sequence[Item]]) -> TaskScores:
    """Compares models by a metric. ``items`` maps roles to the same items in the same order."""
    return _task_scores(metric, *(metric_values(metric, items[role]) for role in ROLES))


def compare_answers(items: Mapping[str, Sequence[Item]]) -> TaskScores | None:
    """Compares models by the log-likelihoods of the right answers, in nats.

    On the same number of items, log-likelihoods reveal smaller differences than accuracy does. The
    log-likelihoods are not normalised over the choices: that would make them as noisy as accuracy.
    Returns ``None`` if ``answer_values`` returns ``None`` for a model.
    """
    values_of_roles = [answer_values(items[role]) for role in ROLES]
    known_values = [values for values in values_of_roles if values is not None]
    return _task_scores(ANSWER_METRIC, *known_values) if len(known_values) == len(ROLES) else None


def answer_values(items: Sequence[Item]) -> list[float] | None:
    """Returns the log-likelihood of each item's right answer, in nats.

    Returns ``None`` if the model generates answers, or an item does not have one right choice.
    """
    values = []
    for item in items:
        responses = item.response if isinstance(item.response, list) else []
        index = item.target  # of the right choice
        if not isinstance(index, int):  # the target is text, which may be the only choice
            index = 0 if len(responses) == 1 else -1  # -1: unknown
        response = responses[index] if 0 <= index < len(responses) else None
        if not isinstance(response, list):  # generated text, or an unknown right answer
            return None
        values.append(float(response[0]))  # ``response`` is [log-likelihood, is greedy]
    return values


def _task_scores(
    metric: str, teacher: Sequence[float], pruned: Sequence[float], distilled: Sequence[float]
) -> TaskScores:
    return TaskScores(
        metric=metric,
        items=len(teacher),
        teacher=Score.of(teacher),
        pruned=Score.of(pruned),
        distilled=Score.of(distilled),
        differences=Differences(difference(distilled, teacher), difference(pruned, teacher)),
        recovered=recovered(teacher, pruned, distilled),
    )


@dataclass(frozen=True)
class SizeQuality(ModelQuality):
    """Quality of a student with some added layers of its teacher, on held-out text."""

    sources: dict[str, TextQuality]
    """Quality by source of the text."""


@dataclass(frozen=True)
class AddLayersResult:
    """A student with added layers of its teacher, and the quality of students of all sizes."""

    kept_layers: list[int]
    """For each layer of the model with added layers, its number in the model before all pruning."""
    added_layers: list[int]
    """The numbers in ``kept_layers`` of the layers that were added, without training."""
    sizes: dict[int, SizeQuality]
    """By number of layers, from the student's to one less than the teacher's."""
    teacher_layers: int
    teacher_parameters: int
    tokens: int
    """Tokens of the held-out text."""
