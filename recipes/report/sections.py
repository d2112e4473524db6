"""Sections that a report has only where their stage was part of the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields

from markupsafe import Markup

from nemo_convert.architecture import Architecture
from nemo_convert.results import GgufResult
from recipes.core.manifest import Manifest
from recipes.core.metrics import flat
from recipes.engines.bench import BASELINE
from recipes.engines.results import BenchmarkResults, BenchmarkRow, EngineResult
from recipes.evaluation.results import EvaluationResult, TaskResults, TextQuality
from recipes.planning.results import PlanResult
from recipes.report.format import scaled
from recipes.report.gates import Verdict, judge, parse
from recipes.report.trade_offs import Z95, Dimension, Mark, interval_rows, trade_off_plot
from recipes.search.results import LatencyResult, SearchResult

PARAMETERS = Dimension("parameters", lambda v: scaled(v, "KMBT").replace(".0 ", " "))
DISK = Dimension("size on disk", lambda v: scaled(v, "kMGTP", "B").replace(".0 ", " "))
LATENCY = Dimension("decode latency", lambda v: f"{v:,.4g} ms")
PERPLEXITY = Dimension("perplexity", lambda v: f"{v:,.4g}")
DIVERGENCE = Dimension("KL to the teacher", lambda v: f"{v:,.3g}")
ACCURACY = Dimension("mean of the tasks", lambda v: f"{v:.1%}", higher_is_better=True)
REPORTED_ROLES = {"teacher": "teacher", "student": "distilled"}
"""Roles of timed models, and which evaluated model each is."""
LATENCIES = "latency_model"
"""Kind of a stage that timed engines for a search."""
FEW = 8
"""As many candidates of a search can all be named in a plot."""


def sections(
    found: Mapping[str, Manifest], evaluation: EvaluationResult, earlier: Mapping[str, Manifest]
) -> dict[str, object]:
    """What the optional inputs have to show; ``None`` for each that is not there.

    Args:
        found: Manifests by the report's names of its inputs.
        evaluation: What the models lost.
        earlier: Manifests of the stages that the inputs were made from.
    """
    rows: list[BenchmarkRow] = []
    shown: dict[str, object] = dict.fromkeys(("tasks", "speed", "engine", "gguf", "plan", "search"))
    if "tasks" in found:
        shown |= tasks_section(found["tasks"].result(TaskResults))
    if "speed" in found:
        measured = found["speed"].result(BenchmarkResults)
        shown |= speed_section(measured)
        rows = measured.rows
    if "engine" in found:
        shown["engine"] = dict(flat(asdict(found["engine"].result(EngineResult))))
    if "gguf" in found:
        shown["gguf"] = asdict(found["gguf"].result(GgufResult))
    if "plan" in found:
        shown["plan"] = found["plan"].result(PlanResult)
    if "search" in found:
        shown |= search_section(found["search"].result(SearchResult), earlier)
    return {
        **shown,
        "trade_offs": list(trade_offs(evaluation, rows)),
        "engine_numbers": engine_numbers(rows),
    }


def tasks_section(results: TaskResults) -> dict[str, object]:
    """Tasks, and those that are shares of their items also as a plot."""
    rows = {
        name: [(role, score.value, score.standard_error) for role, score in task.models().items()]
        for name, task in results.tasks.items()
        if task.is_share
    }
    title = "Score of each model in each task, with 95% intervals"
    plot = interval_rows("plot-tasks", title, rows) if rows else None
    return {"tasks": results, "tasks_plot": plot}


def gates_section(texts: Sequence[str], found: Mapping[str, Manifest]) -> list[Verdict]:
    """Gates, as far as the page's inputs have their figures."""
    return judge(map(parse, texts), {manifest.kind: manifest for manifest in found.values()})


def speed_section(results: BenchmarkResults) -> dict[str, object]:
    """What was measured, the longest bar, the engine whose decoding gained most, the best draft."""
    every = results.speedups
    seen = [v for s in every for v in (s.prefill, s.prefill_roofline, s.decode, s.decode_roofline)]
    # What is deployed is an engine, where there is one; transformers is only the measure.
    engines = [one for one in every if one.backend != BASELINE] or every
    return {
        "speed": results,
        "largest_speedup": 1.08 * max([1.0, *seen]),
        "fastest": max(engines, key=lambda one: one.decode, default=None),
        "best_draft": results.best_draft(),
    }


def search_section(search: SearchResult, earlier: Mapping[str, Manifest]) -> dict[str, object]:
    """Candidates of a search, also as a trade-off; in which axes they differ; what was timed."""
    every = search.candidates
    marks = [
        Mark(
            # Of very many only the best ones' names can be read.
            one.name if len(every) <= FEW or one.chosen or one.pareto else "",
            "distilled" if one.chosen else "quiet",
            float(one.parameters),
            one.perplexity,
        )
        for one in every
    ]
    axes = [spec.name for spec in fields(Architecture)]
    return {
        "search": search,
        "search_axes": [a for a in axes if len({getattr(one.shape, a) for one in every}) > 1],
        "search_plot": trade_off_plot("plot-search", marks, PARAMETERS, PERPLEXITY),
        "latency": next(
            (one.result(LatencyResult) for one in earlier.values() if one.kind == LATENCIES), None
        ),
    }


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
