"""A page that sets several runs side by side: figures, Pareto fronts, and what was different."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError
from recipes.distillation.results import DistillationResult
from recipes.engines.results import BenchmarkResults
from recipes.evaluation.results import EvaluationResult, TaskResults
from recipes.report.cost import machine_hours
from recipes.report.format import any_value, render_template
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
from recipes.report.trade_offs import Z95, Mark, front_of, trade_off_plot

TEMPLATE = "compare.html.j2"
QUALITIES = {"perplexity": PERPLEXITY, "kl": DIVERGENCE, "tasks": ACCURACY}
COSTS = {"parameters": PARAMETERS, "disk": DISK, "latency": LATENCY}


@dataclass(frozen=True)
class TimedOn:
    """What a latency is of: an engine, its setting, and the machine."""

    name: str
    batch_size: int
    prompt_tokens: int
    cpu: str
    threads: int


@dataclass
class RunRow:
    """One run's distilled model, and what the run cost."""

    number: str
    name: str
    recipe: str
    comparable: bool
    """Whether it was measured on the text that most were."""
    is_best: bool
    gap: tuple[float, float] | None
    """Mean difference of its losses to the best run's, with its standard error."""
    found: EvaluationResult
    perplexity: float
    kl: float
    tasks: float | None
    teacher_tasks: float | None
    parameters: int
    disk: int | None
    latency: float | None
    tokens: int | None
    hours: float
    fronts: list[tuple[str, str]] = field(default_factory=list)
    """Quality and cost of every front that it is on."""


def render_comparison(paths: Iterable[Path], out: Path) -> list[RunRow]:
    """Writes the page about two or more runs, in or below directories; returns what it shows."""
    content = comparison([read_run(path) for path in find_runs(paths)])
    render_template(TEMPLATE, content, out)
    rows: list[RunRow] = content["rows"]
    return rows


def verdict(rows: Iterable[RunRow]) -> str:
    """Which run is best, by which rule, and which ones chance may have put behind it."""
    [best] = [row for row in rows if row.is_best]
    close = [r.name for r in rows if r.gap is not None and r.gap[0] < Z95 * r.gap[1]]
    rule = f"the lowest loss on the same held-out text, perplexity {best.perplexity:.2f}"
    doubt = f"; not told apart from it at 95%: {', '.join(close)}" if close else ""
    return f"best: {best.name}, {rule}{doubt}"


def comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Everything that the page shows."""
    measured = [(run, found) for run in runs if (found := run.evaluation) is not None]
    text = common_text(runs)
    same = [(run, found) for run, found in measured if run.text() == text]
    if len(same) < 2:
        raise RecipeError(
            f"of {len(runs)} run{'s' * (len(runs) != 1)}, {len(measured)} came to an evaluation "
            f"and {len(same)} of them on the same held-out text; there is nothing to compare.",
            "give two or more complete runs of the same data",
        )
    names = _names(runs)
    best, best_found = min(same, key=lambda pair: pair[1].distilled.loss)
    engine = _common_engine([run for run, _ in same])
    rows = [
        _row(str(number), names[run.path], run, found, best if run.text() == text else None, engine)
        for number, (run, found) in enumerate(measured, 1)
    ]
    comparable = [row for row in rows if row.comparable]
    plots = [plot for quality in QUALITIES for plot in _plots(quality, comparable)]
    return {
        "title": f"Comparison of {len(measured)} runs",
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "rows": rows,
        "best": names[best.path],
        "teacher": best_found.teacher,
        "teacher_tasks": next((r.teacher_tasks for r in comparable if r.teacher_tasks), None),
        "plots": plots,
        "engine": engine,
        "others": [row for row in rows if not row.comparable],
        "incomplete": [(names[run.path], run) for run in runs if run.incomplete],
        "unmeasured": [names[run.path] for run in runs if run.evaluation is None],
        "differences": [
            (name, [any_value(value, name.rpartition(".")[2]) for value in values])
            for name, values in differing_settings([run for run, _ in measured])
        ],
    }


def _names(runs: Sequence[RunRecord]) -> dict[Path, str]:
    """The shortest ends of the runs' paths that tell them apart; a number says too little."""
    depth = 2 if any(run.path.name.isdigit() for run in runs) else 1
    while depth < max(len(run.path.parts) for run in runs):
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(names)) == len(runs):
            break
        depth += 1
    return {run.path: "/".join(run.path.parts[-depth:]) for run in runs}


def _row(
    number: str,
    name: str,
    run: RunRecord,
    found: EvaluationResult,
    best: RunRecord | None,
    engine: TimedOn | None,
) -> RunRow:
    tasks, exported = run.find("task_results"), run.exported
    means = tasks.result(TaskResults).means() if tasks else {}
    trained = (m.result_if("distill", DistillationResult) for m in run.stages.values())
    return RunRow(
        number=number,
        name=name,
        recipe=run.recipe,
        comparable=best is not None,
        is_best=best is run,
        gap=paired_difference(run.losses, best.losses) if best and best is not run else None,
        found=found,
        perplexity=found.distilled.perplexity,
        kl=found.distilled.kl_to_teacher,
        tasks=means.get("distilled"),
        teacher_tasks=means.get("teacher"),
        parameters=found.distilled.parameters,
        disk=exported.total_bytes() if exported else None,
        latency=dict(_latencies(run)).get(engine) if engine else None,
        tokens=sum(training.tokens for training in trained if training) or None,
        hours=sum(map(machine_hours, run.stages.values())),
    )


def _latencies(run: RunRecord) -> Iterator[tuple[TimedOn, float]]:
    """Milliseconds for one more token of the student in each engine, at the smallest setting."""
    manifest = run.find("speed_results")
    if manifest is None:
        return
    found = manifest.result(BenchmarkResults)
    setting = smallest_setting(found.rows)
    for row in found.rows:
        latency = row.decode_latency_ms
        if row.role == "student" and row.setting == setting and latency is not None:
            yield TimedOn(row.engine, *setting, found.machine.cpu, found.machine.threads), latency


def _common_engine(runs: Sequence[RunRecord]) -> TimedOn | None:
    """The engine, setting and machine whose latencies are compared.

    The first benchmarked run's fastest engine; a run that was not measured so has no latency here.
    """
    for run in runs:
        if latencies := dict(_latencies(run)):
            return min(latencies, key=lambda timed: latencies[timed])
    return None


def _plots(quality: str, rows: Sequence[RunRow]) -> list[dict[str, str]]:
    """One quality against each cost that at least two runs have; notes who is on the front."""
    up, plots = QUALITIES[quality], []
    for cost, across in COSTS.items():
        chosen = [r for r in rows if None not in (getattr(r, quality), getattr(r, cost))]
        if len(chosen) < 2:
            continue
        marks = [_mark(row, quality, cost) for row in chosen]
        for index in front_of(marks, up):
            chosen[index].fronts.append((quality, cost))
        plots.append(
            {
                "title": f"{up.title.capitalize()} against {across.title}".replace("Kl", "KL"),
                "plot": trade_off_plot(
                    f"plot-{quality}-{cost}", [*marks, *_teacher(chosen, quality, cost)], across, up
                ),
            }
        )
    return plots


def _mark(row: RunRow, quality: str, cost: str) -> Mark:
    price = getattr(row, cost)
    if quality == "perplexity":
        return quality_mark("distilled", row.number, row.found.distilled, price)
    return Mark(row.number, "distilled", price, getattr(row, quality))


def _teacher(rows: Sequence[RunRow], quality: str, cost: str) -> list[Mark]:
    """The teacher as a reference where all runs have the same one and its cost is known."""
    teacher = rows[0].found.teacher
    if cost != "parameters" or quality == "kl" or any(r.found.teacher != teacher for r in rows):
        return []
    value = rows[0].teacher_tasks if quality == "tasks" else teacher.perplexity
    if value is None:
        return []
    return [Mark("teacher", "teacher", teacher.parameters, value, reference=True)]
