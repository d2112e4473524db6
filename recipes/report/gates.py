"""Gates: requirements on measured values of a run, such as ``recovered.sciq >= 0.95``.

A gate is parsed as NAME OP NUMBER, and never executed as code. NAME is one of the metrics below. A
metric of a benchmark has the benchmark's name after a dot.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

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
    r"\s*(?P<name>[A-Za-z_]\w*(?:\.[\w-]+)?)\s*(?P<operator>>=|<=|>|<)\s*"  # "recovered.sciq >= "
    r"(?P<threshold>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*"  # "0.95", ".5" or "-1.5e-3"
)
TEXT_METRICS: dict[str, Callable[[EvaluationResult], float | None]] = {
    "recovered": lambda e: e.recovered,
    "perplexity": lambda e: e.distilled.perplexity,
    "perplexity_ratio": lambda e: e.distilled.perplexity / e.teacher.perplexity,
    "kl_to_teacher": lambda e: e.distilled.kl_to_teacher,
    "top1_agreement": lambda e: e.distilled.top1_agreement,
}
"""Metrics of the distilled model on held-out text (artifact type ``eval_results``)."""
TASK_METRICS: dict[str, Callable[[TaskScores], float | None]] = {
    "recovered": lambda t: t.recovered,
    "score": lambda t: t.distilled.value,
    "difference": lambda t: t.differences.distilled.value,
    "difference_low": lambda t: t.differences.distilled.low,
}
"""Metrics of one benchmark (artifact type ``task_results``). Differences are distilled minus
teacher; ``difference_low`` is the lower end of the 95% interval."""
SERVED_METRICS: dict[str, Callable[[ServedTask], float | None]] = {
    "served_score": lambda t: t.served.value,
    "served_difference": lambda t: t.difference.value,
    "served_difference_low": lambda t: t.difference.low,
}
"""Metrics of the served model on one benchmark (artifact type ``served_results``). Differences are
served minus student, that is, minus the model before its conversion for the server."""
SERVED_PERPLEXITY = "served_perplexity_ratio"
"""Perplexity of the served model divided by the student's (artifact type ``served_results``)."""
SPEEDUP_METRICS: dict[str, Callable[[Speedup], float]] = {
    "prefill": lambda s: s.prefill,
    "decode": lambda s: s.decode,
}
"""Speed-ups of the student over the teacher (artifact type ``speed_results``). A gate uses the
minimum over all engines, batch sizes and prompt lengths. If no engine was measured, it uses the
minimum in the baseline, transformers."""


@dataclass(frozen=True)
class Gate:
    """A metric, and the range in which its measured value must be."""

    name: str
    """Name of a metric, such as ``perplexity``, ``recovered.sciq`` or ``speedup.decode``."""
    operator: str
    """A key of ``OPERATORS``."""
    threshold: float

    def __str__(self) -> str:
        return f"{self.name} {self.operator} {self.threshold:g}"


@dataclass(frozen=True)
class Verdict:
    """A gate and the measured value; ``None`` if the value is undefined or was not measured."""

    gate: Gate
    measured: float | None

    @property
    def passed(self) -> bool:
        """Whether the value is in the required range; false without a value."""
        compare = OPERATORS[self.gate.operator]
        return self.measured is not None and compare(self.measured, self.gate.threshold)

    @property
    def measured_text(self) -> str | None:
        """The value, with enough digits to show on which side of the threshold the value is."""
        if self.measured is None:
            return None
        texts = (f"{self.measured:.{digits}g}" for digits in range(4, 18))
        # The shortest text with the same verdict. 17 digits identify every float, so one exists.
        return next(t for t in texts if replace(self, measured=float(t)).passed == self.passed)

    def __str__(self) -> str:
        if self.measured is not None:
            text = f"measured {self.measured_text}"
        elif self.gate.name.startswith("recovered"):
            # ``recovered`` divides by the quality that pruning lost.
            text = "undefined: pruning added no loss beyond noise, or there are too few sequences"
        else:
            text = "not measured"
        return f"{self.gate}: {text}"


def parse_gate(text: str) -> Gate:
    """Parses a gate of the form ``NAME OP NUMBER``. Does not check that the metric exists.

    Raises ``RecipeError`` if the text does not have this form.
    """
    match = _GATE.fullmatch(text)
    if not match:
        raise RecipeError(
            f"invalid gate '{text}': must be NAME OP NUMBER",
            f"use a form such as 'recovered.sciq >= 0.95'; OP is one of {' '.join(OPERATORS)}",
        )
    return Gate(match["name"], match["operator"], float(match["threshold"]))


def metric_names(stages: Iterable[tuple[StageConfig, str]]) -> list[str]:
    """Returns the names of all metrics that stages measure, as in gates.

    ``stages`` has each stage's settings, and the type of its artifact, such as ``eval_results``.
    """
    names: list[str] = []
    for config, kind in stages:
        if kind == "eval_results":
            names += TEXT_METRICS.keys()
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
    """Yields a problem for each gate on a metric that is not in the recipe's ``metric_names``."""
    use_metric = f"use one of: {', '.join(names)}"
    for gate in gates:
        if gate.name not in names:
            yield Problem(
                rules.GATES,
                f"invalid gate '{gate}': this recipe does not measure {gate.name}."
                f"{did_you_mean(gate.name, names)}",
                use_metric if names else "remove the gate, or add a stage that measures it",
            )


def judge(gates: Iterable[Gate], results: Mapping[str, Manifest]) -> list[Verdict]:
    """Compares gates with measured values; leaves out gates whose stage has no result.

    If several manifests in ``results`` have a metric, the last one's value is used.
    """
    values = {name: value for manifest in results.values() for name, value in _values(manifest)}
    return [Verdict(gate, values[gate.name]) for gate in gates if gate.name in values]


def _values(manifest: Manifest) -> Iterator[tuple[str, float | None]]:
    """Yields name and value of each metric of one result.

    A value is ``None`` if it is undefined, or if the stage could not measure it.
    """
    if manifest.kind == "eval_results":
        evaluation = manifest.result(EvaluationResult)
        yield from ((name, read(evaluation)) for name, read in TEXT_METRICS.items())
    if manifest.kind == "task_results":
        for task, scores in manifest.result(TaskResults).tasks.items():
            yield from ((f"{name}.{task}", read(scores)) for name, read in TASK_METRICS.items())
    if manifest.kind == "served_results":
        result = manifest.result(ServedResult)
        for task, served in result.tasks.items():
            yield from ((f"{name}.{task}", read(served)) for name, read in SERVED_METRICS.items())
        text = result.text  # ``None`` if the perplexity was not measured
        ratio = text.served_perplexity / text.student_perplexity if text else None
        yield SERVED_PERPLEXITY, ratio
    if manifest.kind == "speed_results":
        speedups = manifest.result(BenchmarkResults).engine_speedups()
        for name, speedup_of in SPEEDUP_METRICS.items():
            yield f"speedup.{name}", min(map(speedup_of, speedups), default=None)
