"""Gates: requirements on measured values of a run, such as ``recovered.sciq >= 0.95``.

A gate is parsed as NAME OP NUMBER. It is never executed as code.
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
from recipes.evaluation.results import (
    EvaluationResult,
    ServedResult,
    ServedTask,
    TaskResults,
    TaskScores,
)
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
TEXT_METRICS: dict[str, Callable[[EvaluationResult], float | None]] = {
    "recovered": lambda e: e.recovered,
    "perplexity": lambda e: e.distilled.perplexity,
    "perplexity_ratio": lambda e: e.distilled.perplexity / e.teacher.perplexity,
    "kl_to_teacher": lambda e: e.distilled.kl_to_teacher,
    "top1_agreement": lambda e: e.distilled.top1_agreement,
}
"""Metrics of the distilled model on held-out text (kind ``eval_results``)."""
TASK_METRICS: dict[str, Callable[[TaskScores], float | None]] = {
    "recovered": lambda t: t.recovered,
    "score": lambda t: t.distilled.value,
    "difference": lambda t: t.differences.distilled.value,
    "difference_low": lambda t: t.differences.distilled.low,
}
"""Metrics of one benchmark (kind ``task_results``). Differences are distilled minus teacher."""
SERVED_METRICS: dict[str, Callable[[ServedTask], float | None]] = {
    "served_score": lambda t: t.served.value,
    "served_difference": lambda t: t.difference.value,
    "served_difference_low": lambda t: t.difference.low,
}
"""Metrics of the served model on one benchmark (kind ``served_results``). Differences are served
minus student."""
SERVED_PERPLEXITY = "served_perplexity_ratio"
"""Perplexity of the served model divided by the student's (kind ``served_results``)."""
SPEEDUP_METRICS: dict[str, Callable[[Speedup], float]] = {
    "prefill": lambda s: s.prefill,
    "decode": lambda s: s.decode,
}
"""Speed-ups of the student over the teacher (kind ``speed_results``). A gate uses the minimum over
all engines, batch sizes and prompts. The baseline, transformers, counts only without an engine."""


@dataclass(frozen=True)
class Gate:
    """A measured value's name and required range."""

    name: str
    operator: str
    threshold: float

    def __str__(self) -> str:
        return f"{self.name} {self.operator} {self.threshold:g}"


@dataclass(frozen=True)
class Verdict:
    """A gate with the measured value, which is ``None`` if it could not be measured."""

    gate: Gate
    measured: float | None

    @property
    def passed(self) -> bool:
        """Whether the value is in range; false if it could not be measured."""
        compare = OPERATORS[self.gate.operator]
        return self.measured is not None and compare(self.measured, self.gate.threshold)

    def __str__(self) -> str:
        if self.measured is not None:
            text = f"measured {self.measured:.4g}"
        elif self.gate.name.startswith("recovered"):
            text = "undefined, because the loss added by pruning is within noise"
        else:
            text = "not measured"
        return f"{self.gate}: {text}"


def parse_gate(text: str) -> Gate:
    """Parses ``NAME OP NUMBER``.

    Raises:
        RecipeError: The text has another form.
    """
    match = _GATE.fullmatch(text)
    if not match:
        raise RecipeError(
            f"invalid gate '{text}': must be NAME OP NUMBER",
            f"use a form such as 'recovered.sciq >= 0.95'; OP is one of {' '.join(OPERATORS)}",
        )
    return Gate(match["name"], match["operator"], float(match["threshold"]))


def metric_names(stages: Iterable[tuple[StageConfig, str]]) -> list[str]:
    """Returns the names of all values that stages measure.

    Args:
        stages: The settings of each stage, and the kind of its result, such as ``eval_results``.
    """
    names: list[str] = []
    for config, kind in stages:
        if kind == "eval_results":
            names += TEXT_METRICS
        tasks: list[str] = getattr(config, "tasks", [])
        if kind == "task_results":
            names += [f"{metric}.{task}" for task in tasks for metric in TASK_METRICS]
        if kind == "served_results":
            names += [f"{metric}.{task}" for task in tasks for metric in SERVED_METRICS]
            names.append(SERVED_PERPLEXITY)
        if kind == "speed_results":
            names += [f"speedup.{metric}" for metric in SPEEDUP_METRICS]
    return names


def gate_problems(gates: Iterable[Gate], names: Collection[str]) -> Iterator[Problem]:
    """Yields a problem for each gate on a value that the recipe does not measure."""
    for gate in gates:
        if gate.name not in names:
            yield Problem(
                rules.GATES,
                f"invalid gate '{gate}': this recipe does not measure {gate.name}."
                f"{did_you_mean(gate.name, names)}",
                f"use one of: {', '.join(names)}"
                if names
                else "remove the gate, or add a stage that measures it",
            )


def judge(gates: Iterable[Gate], results: Mapping[str, Manifest]) -> list[Verdict]:
    """Compares gates with measured values; leaves out gates whose stage has no result.

    Args:
        gates: The gates.
        results: Manifests by stage, in order: a later stage's value replaces an earlier one's.
    """
    values = {name: value for manifest in results.values() for name, value in _values(manifest)}
    return [Verdict(gate, values[gate.name]) for gate in gates if gate.name in values]


def _values(manifest: Manifest) -> Iterator[tuple[str, float | None]]:
    """Yields the metrics of one result, by their names in gates."""
    if manifest.kind == "eval_results":
        evaluation = manifest.result(EvaluationResult)
        yield from ((name, metric(evaluation)) for name, metric in TEXT_METRICS.items())
    if manifest.kind == "task_results":
        for task, scores in manifest.result(TaskResults).tasks.items():
            yield from ((f"{name}.{task}", get(scores)) for name, get in TASK_METRICS.items())
    if manifest.kind == "served_results":
        result = manifest.result(ServedResult)
        for task, served in result.tasks.items():
            yield from ((f"{name}.{task}", get(served)) for name, get in SERVED_METRICS.items())
        text = result.text
        ratio = text.served_perplexity / text.student_perplexity if text else None
        yield SERVED_PERPLEXITY, ratio
    if manifest.kind == "speed_results":
        speedups = manifest.result(BenchmarkResults).engine_speedups()
        for name, metric in SPEEDUP_METRICS.items():
            yield f"speedup.{name}", min(map(metric, speedups), default=None)
