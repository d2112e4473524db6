"""Sections that a report has only where their stage was part of the recipe."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from markupsafe import Markup

from nemo_convert.architecture import Architecture
from recipes.core.manifest import Manifest
from recipes.engines.bench import BASELINE
from recipes.engines.results import (
    BenchmarkResults,
    BenchmarkRow,
    EngineResult,
    MachineRates,
    Speedup,
)
from recipes.evaluation.results import (
    EvaluationResult,
    TaskResult,
    TaskResults,
    TaskScores,
    TextQuality,
)
from recipes.planning.results import PlanResult, Table
from recipes.report.format import any_value, label_of, scaled
from recipes.report.gates import Verdict, judge, kind_of, parse
from recipes.report.trade_offs import Z95, Dimension, Mark, interval_rows, speed_bar, trade_off_plot
from recipes.search.results import Candidate, SearchResult

PARAMETERS = Dimension("parameters", lambda v: scaled(v, "KMBT").replace(".0 ", " "))
DISK = Dimension("size on disk", lambda v: scaled(v, "kMGTP", "B").replace(".0 ", " "))
LATENCY = Dimension("decode latency", lambda v: f"{v:,.4g} ms")
PERPLEXITY = Dimension("perplexity", lambda v: f"{v:,.4g}")
DIVERGENCE = Dimension("KL to the teacher", lambda v: f"{v:,.3g}")
ACCURACY = Dimension("mean of the tasks", lambda v: f"{v:.1%}", higher_is_better=True)
REPORTED_ROLES = {"teacher": "teacher", "student": "distilled"}
"""Roles of timed models, and which evaluated model each is."""
PHASES, ENDS = ("prefill", "decode"), ("", "_roofline")
"""Of a speed-up's fields."""
FEW = 8
"""As many candidates of a search can all be named in a plot."""

Figures = list[tuple[str, "Markup"]]
"""Labels and values."""


def sections(found: Mapping[str, Manifest], evaluation: EvaluationResult) -> dict[str, object]:
    """What the optional inputs have to show; ``None`` for each that is not there."""
    rows: list[BenchmarkRow] = []
    shown: dict[str, object] = dict.fromkeys(("tasks", "speed", "engine", "plan", "search"))
    if "tasks" in found:
        shown["tasks"] = tasks_section(found["tasks"].result(TaskResults))
    if "speed" in found:
        measured = found["speed"].result(BenchmarkResults)
        shown["speed"], rows = speed_section(measured), measured.rows
    if "engine" in found:
        shown["engine"] = engine_section(found["engine"].result(EngineResult))
    if "plan" in found:
        shown["plan"] = plan_section(found["plan"].result(PlanResult))
    if "search" in found:
        shown["search"] = search_section(found["search"].result(SearchResult))
    return {
        **shown,
        "trade_offs": list(trade_offs(evaluation, rows)),
        "engine_numbers": engine_numbers(rows),
    }


@dataclass(frozen=True)
class TasksSection:
    """Tasks with the intervals of their scores."""

    tasks: Mapping[str, TaskResult]
    shares: Collection[str]
    """Tasks whose scores are shares of their items."""
    means: Mapping[str, float]
    plot: Markup | None
    answers: Mapping[str, TaskScores]
    """The same items by the log-likelihoods of the right answers, where tasks have them."""


def tasks_section(results: TaskResults) -> TasksSection:
    """Tasks, and those that are shares also as a plot."""
    rows = {
        name: [(role, score.value, score.standard_error) for role, score in task.models().items()]
        for name, task in results.tasks.items()
        if task.is_share
    }
    title = "Score of each model in each task, with 95% intervals"
    plot = interval_rows("plot-tasks", title, rows) if rows else None
    answers = {name: task.answers for name, task in results.tasks.items() if task.answers}
    return TasksSection(results.tasks, rows.keys(), results.means(), plot, answers)


def gates_section(texts: Sequence[str], found: Mapping[str, Manifest]) -> list[Verdict]:
    """Gates, as far as the page's inputs have their figures."""
    results = {manifest.kind: manifest for manifest in found.values()}
    return judge([gate for gate in map(parse, texts) if kind_of(gate) in results], results)


@dataclass(frozen=True)
class BenchmarkSection:
    """Measured rows, and speed-ups beside what the machine's limits would allow."""

    rows: Sequence[BenchmarkRow]
    speedups: Sequence[tuple[Speedup, Mapping[str, Markup]]]
    """Each with a bar for each phase."""
    best: Speedup | None
    machine: MachineRates


def speed_section(results: BenchmarkResults) -> BenchmarkSection:
    """What was measured, and the engine whose decoding gained most."""
    every = results.speedups
    seen = [getattr(s, f"{phase}{end}") for s in every for phase in PHASES for end in ENDS]
    largest = 1.08 * max([1.0, *seen])
    bars = [(one, {phase: _speed(one, phase, largest) for phase in PHASES}) for one in every]
    # What is deployed is an engine, where there is one; transformers is only the measure.
    engines = [one for one in every if one.backend != BASELINE] or every
    best = max(engines, key=lambda one: one.decode, default=None)
    return BenchmarkSection(results.rows, bars, best, results.machine)


def _speed(one: Speedup, phase: str, largest: float) -> Markup:
    style = "distilled" if phase == "decode" else "quiet"
    return speed_bar(getattr(one, phase), getattr(one, f"{phase}_roofline"), largest, style)


def engine_section(result: EngineResult) -> Figures:
    """Every figure of the engine, named as its manifest names it."""
    return [(label_of(n), any_value(n, v)) for n, v in flat(asdict(result)) if v is not None]


def flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested values by dotted name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@dataclass(frozen=True)
class TableSection:
    """A table with its cells written out."""

    title: str
    columns: Sequence[str]
    numeric: Sequence[bool]
    """Whether each column holds numbers alone."""
    rows: Sequence[Sequence[Markup]]


@dataclass(frozen=True)
class PlanSection:
    """Figures and tables of the plan, as it wrote them."""

    figures: Figures
    tables: Sequence[TableSection]


def plan_section(plan: PlanResult) -> PlanSection:
    """The plan, written out."""
    figures = [(label_of(name), any_value(name, value)) for name, value in plan.figures.items()]
    return PlanSection(figures, [_table(table) for table in plan.tables])


def _table(table: Table) -> TableSection:
    return TableSection(
        table.title,
        table.columns,
        [_is_numeric(column) for column in zip(*table.rows, strict=True)],
        [list(map(any_value, table.columns, row)) for row in table.rows],
    )


def _is_numeric(column: Iterable[object]) -> bool:
    return all(v is None or isinstance(v, int | float) for v in column)


@dataclass(frozen=True)
class SearchSection:
    """Candidates of an architecture search."""

    candidates: Sequence[Candidate]
    axes: Sequence[tuple[str, str]]
    """Those in which candidates differ, with their labels."""
    distilled: int
    """Candidates that were trained."""
    budget: Figures
    plot: Markup


def search_section(search: SearchResult) -> SearchSection:
    """Candidates, also as a trade-off."""
    every = search.candidates
    marks = [
        Mark(_label(one, every), _fate(one), float(one.parameters), one.perplexity) for one in every
    ]
    axes = [spec.name for spec in fields(Architecture)]
    return SearchSection(
        candidates=every,
        axes=[(a, label_of(a)) for a in axes if len({getattr(c.shape, a) for c in every}) > 1],
        distilled=sum(one.tokens > 0 for one in every),
        budget=[(label_of(name), any_value(name, value)) for name, value in search.budget.items()],
        plot=trade_off_plot("plot-search", marks, PARAMETERS, PERPLEXITY),
    )


def _label(candidate: Candidate, every: Sequence[Candidate]) -> str:
    """Its name, unless there are so many that only the best ones' can be read."""
    shown = len(every) <= FEW or candidate.chosen or candidate.pareto
    return candidate.name if shown else ""


def _fate(candidate: Candidate) -> str:
    return "distilled" if candidate.chosen else "quiet"


def quality_mark(role: str, label: str, quality: TextQuality, cost: float) -> Mark:
    """A model's perplexity, with the interval that its loss's standard error gives."""
    spread = Z95 * quality.loss_standard_error
    return Mark(
        label,
        role,
        cost,
        quality.perplexity,
        quality.perplexity * math.exp(-spread),
        quality.perplexity * math.exp(spread),
        reference=role == "teacher",
    )


def trade_offs(
    evaluation: EvaluationResult, rows: Sequence[BenchmarkRow]
) -> Iterator[tuple[str, str, Markup]]:
    """Title, note and plot of perplexity against each cost that was measured."""
    quality = evaluation.models()
    sized = [quality_mark(role, role, q, q.parameters) for role, q in quality.items()]
    yield "Parameters", "", trade_off_plot("plot-by-parameters", sized, PARAMETERS, PERPLEXITY)
    setting = smallest_setting(rows)
    same = [row for row in rows if row.setting == setting]
    numbers = engine_numbers(same)
    disk = [(row, float(row.disk_bytes)) for row in same]
    latency = [(row, ms) for row in same if (ms := row.decode_latency_ms)]
    for name, title, across, costs in (
        ("plot-by-size", "Size on disk", DISK, disk),
        ("plot-by-latency", "Decode latency per token", LATENCY, latency),
    ):
        marks = [
            quality_mark(role, numbers[row.engine], quality[role], cost)
            for row, cost in costs
            for role in [REPORTED_ROLES[row.role]]
        ]
        if marks and setting:
            note = f"batch {setting[0]}, prompt of {setting[1]} tokens"
            yield title, note, trade_off_plot(name, marks, across, PERPLEXITY)


def engine_numbers(rows: Iterable[BenchmarkRow]) -> dict[str, str]:
    """A number for every engine; their names would cover each other in a plot."""
    names = dict.fromkeys(row.engine for row in rows)
    return {name: str(number) for number, name in enumerate(names, 1)}


def smallest_setting(rows: Iterable[BenchmarkRow]) -> tuple[int, int] | None:
    """Batch and prompt that say most about latency: the smallest that were measured."""
    return min((row.setting for row in rows), default=None)
