"""Compares runs on one page: quality, cost, Pareto fronts, and settings that differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError
from recipes.core.manifest import Manifest
from recipes.core.statistics import margin95
from recipes.distillation.results import DistillationResult
from recipes.engines.results import BenchmarkResults
from recipes.evaluation.results import EvaluationResult, ModelQuality, TaskResults
from recipes.report.cost import machine_hours
from recipes.report.format import any_value, render_template
from recipes.report.plots import Dimension, Mark, trade_off_plot
from recipes.report.runs import (
    RunRecord,
    common_text,
    differing_settings,
    find_runs,
    paired_difference,
    read_run,
)
from recipes.report.sections import (
    ACCURACY,
    DISK,
    DIVERGENCE,
    LATENCY,
    PARAMETERS,
    PERPLEXITY,
    quality_mark,
    smallest_setting,
)


@dataclass(frozen=True)
class LatencySetting:
    """Conditions of a latency measurement. Only latencies with equal conditions are compared."""

    engine: str
    batch_size: int
    prompt_tokens: int
    cpu: str
    """Name of the CPU model."""
    threads: int


@dataclass(frozen=True)
class RunRow:
    """A row of the page's table: the distilled model of one run, and the cost of the run."""

    number: str
    """Label of the run's marks in plots."""
    name: str
    recipe: str
    comparable: bool
    """Whether the run was evaluated on the same text as most runs."""
    is_best: bool
    gap: tuple[float, float] | None
    """Mean and standard error of this run's losses minus the best run's, in nats; ``None`` for the
    best run, and for runs that cannot be compared with it."""
    evaluation: EvaluationResult
    tasks: Mapping[str, float]
    """Mean score of the tasks that all runs have in common, by role, such as ``distilled``."""
    disk: int | None
    """Bytes of the exported folder."""
    latency: float | None
    """Milliseconds per token in decoding, in the page's ``LatencySetting``, if measured."""
    tokens: int | None
    """Training tokens of all distillations of the run; ``None`` if there are none."""
    hours: float
    """Machine hours."""


Metric = Callable[[RunRow], float | None]
"""Reads a value from a run's row; returns ``None`` if the run did not measure it."""
QUALITIES: dict[str, tuple[Dimension, Metric]] = {
    "perplexity": (PERPLEXITY, lambda row: row.evaluation.distilled.perplexity),
    "kl": (DIVERGENCE, lambda row: row.evaluation.distilled.kl_to_teacher),
    "tasks": (ACCURACY, lambda row: row.tasks.get("distilled")),
}
"""Vertical axes of the plots."""
COSTS: dict[str, tuple[Dimension, Metric]] = {
    "parameters": (PARAMETERS, lambda row: row.evaluation.distilled.parameters),
    "disk": (DISK, lambda row: row.disk),
    "latency": (LATENCY, lambda row: row.latency),
}
"""Horizontal axes of the plots."""


def render_comparison(paths: Iterable[Path], out: Path) -> list[RunRow]:
    """Writes a page that compares all runs in or below ``paths``; returns the rows of its table."""
    content = compare_runs([read_run(path) for path in find_runs(paths)])
    render_template("compare.html.j2", content, out)
    rows: list[RunRow] = content["rows"]
    return rows


def describe_best(rows: Sequence[RunRow]) -> str:
    """Returns a sentence with the best run, the criterion, and runs not significantly worse."""
    [best] = [row for row in rows if row.is_best]
    not_worse = [row.name for row in rows if _is_not_worse(row)]
    perplexity = best.evaluation.distilled.perplexity
    criterion = f"the lowest loss on the same held-out text, perplexity {perplexity:.2f}"
    ties = f"; not significantly worse at 95%: {', '.join(not_worse)}" if not_worse else ""
    return f"best: {best.name}, {criterion}{ties}"


def _is_not_worse(row: RunRow) -> bool:
    """Returns whether the 95% interval of a run's gap to the best run includes 0."""
    if row.gap is None:
        return False
    difference, error = row.gap
    return difference < (margin95(error, row.evaluation.sequences) or 0)


def compare_runs(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Returns the template variables of the page that compares the runs.

    Raises ``RecipeError`` if fewer than two runs were evaluated on the same text.
    """
    text_key = common_text(runs)
    evaluated = [run for run in runs if run.evaluation is not None]
    same_text = [run for run in evaluated if run.text_key() == text_key]
    if len(same_text) < 2:
        raise RecipeError(
            f"nothing to compare: of {len(runs)} run{'s' * (len(runs) != 1)}, {len(evaluated)} "
            f"have an evaluation, and {len(same_text)} of these used the same held-out text",
            "name two or more complete runs with the same held-out text",
        )
    names = _names(runs)
    best = min(same_text, key=_loss_order)
    tasks, other_tasks = split_tasks(evaluated)
    # All rows show the latency of one setting: the fastest setting of the first run with latencies.
    run_latencies = (dict(_latencies(run)) for run in same_text)
    latencies = next(filter(None, run_latencies), {})
    fastest = min(latencies, key=lambda setting: latencies[setting], default=None)
    rows = [
        _row(str(number), names[run.path], run, best if run in same_text else None, tasks, fastest)
        for number, run in enumerate(evaluated, 1)
    ]
    comparable = [row for row in rows if row.comparable]
    # The page shows a teacher only if all runs have the same teacher.
    first, *teachers = [row.evaluation.teacher for row in comparable]
    teacher = first if all(_is_same_teacher(first, other) for other in teachers) else None
    return {
        "title": f"Comparison of {len(evaluated)} runs",
        "time": datetime.now(UTC).isoformat(timespec="minutes"),
        "rows": rows,
        "best": names[best.path],
        "teacher": teacher,
        "tasks": tasks,
        "other_tasks": other_tasks,
        "teacher_tasks": next((r.tasks["teacher"] for r in comparable if r.tasks), None),
        "plots": list(_plots(comparable, teacher)),
        "latency": fastest,
        "others": [row for row in rows if not row.comparable],
        "incomplete": [(names[run.path], run) for run in runs if run.incomplete],
        "unmeasured": [names[run.path] for run in runs if run.evaluation is None],
        "differences": [
            # A name is STAGE.SETTING. ``any_value`` finds the unit in the setting's name.
            (name, [any_value(value, name.rpartition(".")[2]) for value in values])
            for name, values in differing_settings(evaluated)
        ],
    }


def _is_same_teacher(teacher: ModelQuality, other: ModelQuality) -> bool:
    """Returns whether two teachers have the same size and almost the same loss.

    The last digits of a loss depend on the machine and on the number of ranks.
    """
    same_size = teacher.parameters == other.parameters
    return same_size and math.isclose(teacher.loss, other.loss, rel_tol=1e-3)


def _evaluation(run: RunRecord) -> EvaluationResult:
    """Returns the evaluation of a run that was evaluated."""
    assert run.evaluation is not None
    return run.evaluation


def _names(runs: Sequence[RunRecord]) -> dict[Path, str]:
    """Returns each run's name by its path. The name is the last folders of the path.

    All names have the same number of folders: the smallest number that makes the names unique, but
    at least two if any run's folder is a number, as in a sweep.
    """
    depth = 2 if any(run.path.name.isdigit() for run in runs) else 1
    max_depth = max(len(run.path.parts) for run in runs)
    while depth < max_depth and len({run.path.parts[-depth:] for run in runs}) < len(runs):
        depth += 1
    return {run.path: "/".join(run.path.parts[-depth:]) for run in runs}


def _loss_order(run: RunRecord) -> tuple[bool, float]:
    """Returns a key that sorts runs by loss. A loss of NaN is last."""
    loss = _evaluation(run).distilled.loss
    return math.isnan(loss), loss


def split_tasks(runs: Iterable[RunRecord]) -> tuple[list[str], list[str]]:
    """Returns the tasks whose scores can be compared, and all other tasks.

    Scores of a task can be compared if all runs with task results measured it in the same way.
    """
    manifests = filter(None, (run.find("task_results") for run in runs))
    keys = [_task_keys(manifest) for manifest in manifests]  # one dict per run
    names = list(dict.fromkeys(name for run_keys in keys for name in run_keys))
    # A run without the task has the key ``None``.
    common = [name for name in names if len({run_keys.get(name) for run_keys in keys}) == 1]
    return common, [name for name in names if name not in common]


def _task_keys(manifest: Manifest) -> dict[str, tuple[object, ...]]:
    """Returns a key for each task. Scores with equal keys can be compared."""
    # These settings choose the few-shot examples before a question.
    examples = manifest.config.get("limit"), manifest.config.get("seed")
    return {
        name: (
            *(task.metric, task.items, task.version, task.data, task.split, task.num_fewshot),
            examples if task.num_fewshot else None,
            manifest.config.get("precision"),
        )
        for name, task in manifest.result(TaskResults).tasks.items()
    }


def _row(
    number: str,
    name: str,
    run: RunRecord,
    best: RunRecord | None,
    tasks: Sequence[str],
    setting: LatencySetting | None,
) -> RunRow:
    """Returns a run's row.

    ``best`` is the best run; ``None`` if ``run`` cannot be compared with it. ``tasks`` are those
    that all runs have in common. ``setting`` is that of the row's latency; ``None`` without one.
    """
    results, exported = run.find("task_results"), run.exported
    trainings = (m.result_if("distill", DistillationResult) for m in run.stages.values())
    return RunRow(
        number=number,
        name=name,
        recipe=run.recipe,
        comparable=best is not None,
        is_best=best is run,
        gap=paired_difference(run.losses, best.losses) if best and best is not run else None,
        evaluation=_evaluation(run),
        tasks=results.result(TaskResults).means(tasks) if results else {},
        disk=exported.total_bytes() if exported else None,
        latency=dict(_latencies(run)).get(setting) if setting else None,
        tokens=sum(training.tokens for training in trainings if training) or None,
        hours=sum(map(machine_hours, run.stages.values())),
    )


def _latencies(run: RunRecord) -> Iterator[tuple[LatencySetting, float]]:
    """Yields each engine's smallest batch and prompt, and the student's decode latency in ms."""
    manifest = run.find("speed_results")
    if manifest is None:
        return
    results = manifest.result(BenchmarkResults)
    machine, setting = results.machine, smallest_setting(results.rows)
    for row in results.rows:
        latency = row.decode_latency_ms
        if row.role == "student" and row.setting == setting and latency is not None:
            yield LatencySetting(row.engine, *setting, machine.cpu, machine.threads), latency


def _plots(rows: Sequence[RunRow], teacher: ModelQuality | None) -> Iterator[dict[str, str]]:
    """Yields a plot of each quality against each cost that was measured in at least two runs.

    ``teacher`` is ``None`` if the runs have different teachers.
    """
    for quality, (quality_dimension, quality_of) in QUALITIES.items():
        if quality == "kl" and teacher is None:  # the KL to different teachers is not comparable
            continue
        for cost, (cost_dimension, cost_of) in COSTS.items():
            points = [(row, cost_of(row), quality_of(row)) for row in rows]
            marks = [
                quality_mark("distilled", row.number, row.evaluation, x)  # with an interval
                if quality == "perplexity"
                else Mark(row.number, "distilled", x, y)
                for row, x, y in points
                if x is not None and y is not None and math.isfinite(y)
            ]
            if len(marks) > 1:
                if teacher and cost == "parameters":
                    marks += _teacher_mark(rows[0], quality)
                title = f"{quality_dimension.title} against {cost_dimension.title}"
                name = f"plot-{quality}-{cost}"
                plot = trade_off_plot(name, marks, cost_dimension, quality_dimension)
                yield {"title": title[:1].upper() + title[1:], "plot": plot}


def _teacher_mark(row: RunRow, quality: str) -> list[Mark]:
    """Returns the mark of a run's teacher in a plot of quality against parameters.

    The list is empty if the quality was not measured, and for KL: the teacher's KL to itself is 0.
    """
    teacher = row.evaluation.teacher
    value = row.tasks.get("teacher") if quality == "tasks" else teacher.perplexity
    if quality == "kl" or value is None:
        return []
    return [Mark("teacher", "teacher", teacher.parameters, value, reference=True)]
