"""Gates: what a run must measure to count as a success, such as ``recovered.sciq >= 0.95``.

A gate compares one figure of an evaluation with a number. Nothing of a gate is ever executed; the
text is parsed by the grammar NAME OP NUMBER.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from recipes.core.errors import RecipeError, did_you_mean
from recipes.core.manifest import Manifest
from recipes.core.stage import StageConfig
from recipes.engines.results import BenchmarkResults, Speedup
from recipes.evaluation.results import EvaluationResult, TaskResults, TaskScores
from recipes.planning import rules
from recipes.planning.problems import Problem

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
"""Figures of the distilled model on held-out text (kind ``eval_results``)."""
TASK: dict[str, Callable[[TaskScores], float | None]] = {
    "recovered": lambda t: t.recovered,
    "score": lambda t: t.distilled.value,
    "difference": lambda t: t.differences.distilled.value,
    "difference_low": lambda t: t.differences.distilled.low,
}
"""Figures of one benchmark (kind ``task_results``); the differences are to the teacher."""
SPEEDUPS: dict[str, Callable[[Speedup], float]] = {
    "prefill": lambda s: s.prefill,
    "decode": lambda s: s.decode,
}
"""Of the student against the teacher (kind ``speed_results``): of all settings, the least."""


@dataclass(frozen=True)
class Gate:
    """A figure's name and what it must be."""

    name: str
    operator: str
    threshold: float

    def __str__(self) -> str:
        return f"{self.name} {self.operator} {self.threshold:g}"

    def holds(self, measured: float | None) -> bool:
        """Whether a measured value is as it must be; what could not be measured is not."""
        return measured is not None and OPERATORS[self.operator](measured, self.threshold)


@dataclass(frozen=True)
class Verdict:
    """What was measured, and whether that passes; ``None`` where there is no such figure."""

    gate: Gate
    measured: float | None
    passed: bool

    def __str__(self) -> str:
        found = "not measurable, pruning cost no more than noise"
        if self.measured is not None:
            found = f"measured {self.measured:.4g}"
        elif not self.gate.name.startswith("recovered"):
            found = "not measured"
        return f"{self.gate}: {found}"


def parse(text: str) -> Gate:
    """Reads ``NAME OP NUMBER``, or refuses."""
    match = _GATE.fullmatch(text)
    if not match:
        raise RecipeError(
            f"gate '{text}' is not of the form NAME OP NUMBER.",
            f"write it like 'recovered.sciq >= 0.95', with one of {' '.join(OPERATORS)}",
        )
    return Gate(match["name"], match["operator"], float(match["threshold"]))


def known_names(stages: Mapping[str, StageConfig], kinds: Mapping[str, str]) -> dict[str, str]:
    """Figures that a recipe measures, with the kind of result, of those by stage, that has each."""
    names: dict[str, str] = {}
    for stage, config in stages.items():
        kind = kinds[stage]
        if kind == "eval_results":
            names |= dict.fromkeys(EVALUATION, kind)
        if kind == "task_results":
            tasks: list[str] = getattr(config, "tasks", [])
            names |= {f"{figure}.{task}": kind for task in tasks for figure in TASK}
        if kind == "speed_results":
            names |= {f"speedup.{figure}": kind for figure in SPEEDUPS}
    return names


def problems(gates: Iterable[Gate], names: Mapping[str, str]) -> Iterator[Problem]:
    """Finds gates on figures that the recipe does not measure."""
    for gate in gates:
        if gate.name not in names:
            yield Problem(
                rules.GATES,
                f"gate '{gate}': this recipe does not measure {gate.name}."
                f"{did_you_mean(gate.name, names)}",
                f"use one of: {', '.join(names) or 'none, it has no evaluation'}",
            )


def judge(gates: Iterable[Gate], results: Mapping[str, Manifest]) -> list[Verdict]:
    """Compares what was measured, in manifests by kind, with the gates that are on it."""
    measured = {name: value for m in results.values() for name, value in _figures(m)}
    known = [gate for gate in gates if gate.name in measured]
    return [Verdict(g, measured[g.name], g.holds(measured[g.name])) for g in known]


def _figures(manifest: Manifest) -> Iterator[tuple[str, float | None]]:
    """What gates can be on of a stage's result."""
    if manifest.kind == "eval_results":
        evaluation = manifest.result(EvaluationResult)
        yield from ((name, figure(evaluation)) for name, figure in EVALUATION.items())
    if manifest.kind == "task_results":
        for task, scores in manifest.result(TaskResults).tasks.items():
            yield from ((f"{name}.{task}", figure(scores)) for name, figure in TASK.items())
    if manifest.kind == "speed_results":
        every = manifest.result(BenchmarkResults).speedups
        for name, figure in SPEEDUPS.items():
            yield f"speedup.{name}", min(map(figure, every), default=None)
