"""Gates: measured values that a run must reach, such as ``recovered.sciq >= 0.95``.

A gate compares one measured value with a number. Its text is parsed as NAME OP NUMBER and is never
executed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from recipes.core.errors import RecipeError, did_you_mean
from recipes.core.manifest import Manifest
from recipes.core.stage import StageConfig
from recipes.engines.results import BenchmarkResults, Speedup
from recipes.evaluation.results import EvaluationResult, TaskResults, TaskScores
from recipes.planning import rules
from recipes.planning.rules import Problem

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_GATE = re.compile(
    r"\s*(?P<name>[A-Za-z_]\w*(?:\.[\w-]+)?)\s*(?P<operator>>=|<=|>|<)\s*"
    r"(?P<threshold>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*"
)
EVALUATION: dict[str, Callable[[EvaluationResult], float | None]] = {
    "recovered": lambda e: e.recovered,
    "perplexity": lambda e: e.distilled.perplexity,
    "perplexity_ratio": lambda e: e.distilled.perplexity / e.teacher.perplexity,
    "kl_to_teacher": lambda e: e.distilled.kl_to_teacher,
    "top1_agreement": lambda e: e.distilled.top1_agreement,
}
"""Values of the distilled model on held-out text (kind ``eval_results``)."""
TASK: dict[str, Callable[[TaskScores], float | None]] = {
    "recovered": lambda t: t.recovered,
    "score": lambda t: t.distilled.value,
    "difference": lambda t: t.differences.distilled.value,
    "difference_low": lambda t: t.differences.distilled.low,
}
"""Values of one benchmark (kind ``task_results``). Differences are to the teacher."""
SPEEDUPS: dict[str, Callable[[Speedup], float]] = {
    "prefill": lambda s: s.prefill,
    "decode": lambda s: s.decode,
}
"""Speed-ups of the student over the teacher (kind ``speed_results``); the minimum counts."""


@dataclass(frozen=True)
class Gate:
    """Name of a measured value, and its required range."""

    name: str
    operator: str
    threshold: float

    def __str__(self) -> str:
        return f"{self.name} {self.operator} {self.threshold:g}"


@dataclass(frozen=True)
class Verdict:
    """A gate with the measured value; ``None`` if it could not be measured."""

    gate: Gate
    measured: float | None

    @property
    def passed(self) -> bool:
        """Whether the value is in range; one that could not be measured is not."""
        compare = OPERATORS[self.gate.operator]
        return self.measured is not None and compare(self.measured, self.gate.threshold)

    def __str__(self) -> str:
        if self.measured is not None:
            text = f"measured {self.measured:.4g}"
        elif self.gate.name.startswith("recovered"):
            text = "not measurable, since pruning lost no more than noise"
        else:
            text = "not measured"
        return f"{self.gate}: {text}"


def parse(text: str) -> Gate:
    """Parses ``NAME OP NUMBER``.

    Raises:
        RecipeError: The text has another form.
    """
    match = _GATE.fullmatch(text)
    if not match:
        raise RecipeError(
            f"invalid gate '{text}': it must have the form NAME OP NUMBER.",
            f"write it like 'recovered.sciq >= 0.95', with one of {' '.join(OPERATORS)}",
        )
    return Gate(match["name"], match["operator"], float(match["threshold"]))


def known_names(stages: Mapping[str, StageConfig], kinds: Mapping[str, str]) -> list[str]:
    """Returns the names of all values that a recipe measures.

    Args:
        stages: Settings by stage.
        kinds: Kind of result by stage.
    """
    names: list[str] = []
    for stage, config in stages.items():
        if kinds[stage] == "eval_results":
            names += EVALUATION
        if kinds[stage] == "task_results":
            tasks: list[str] = getattr(config, "tasks", [])
            names += [f"{value}.{task}" for task in tasks for value in TASK]
        if kinds[stage] == "speed_results":
            names += [f"speedup.{value}" for value in SPEEDUPS]
    return names


def problems(gates: Iterable[Gate], names: Collection[str]) -> Iterator[Problem]:
    """Yields a problem for each gate on a value that the recipe does not measure."""
    for gate in gates:
        if gate.name not in names:
            yield Problem(
                rules.GATES,
                f"gate '{gate}': this recipe does not measure {gate.name}."
                f"{did_you_mean(gate.name, names)}",
                f"use one of: {', '.join(names) or 'none, it has no evaluation'}",
            )


def judge(gates: Iterable[Gate], results: Mapping[str, Manifest]) -> list[Verdict]:
    """Compares gates with the values in manifests, by kind; gates without a value are left out."""
    values = {name: value for manifest in results.values() for name, value in _values(manifest)}
    return [Verdict(gate, values[gate.name]) for gate in gates if gate.name in values]


def _values(manifest: Manifest) -> Iterator[tuple[str, float | None]]:
    """Yields the values of one result by the names that gates use."""
    if manifest.kind == "eval_results":
        evaluation = manifest.result(EvaluationResult)
        yield from ((name, value(evaluation)) for name, value in EVALUATION.items())
    if manifest.kind == "task_results":
        for task, scores in manifest.result(TaskResults).tasks.items():
            yield from ((f"{name}.{task}", value(scores)) for name, value in TASK.items())
    if manifest.kind == "speed_results":
        speedups = manifest.result(BenchmarkResults).speedups
        for name, value in SPEEDUPS.items():
            yield f"speedup.{name}", min(map(value, speedups), default=None)
