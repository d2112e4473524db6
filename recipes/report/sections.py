"""Sections that a report has only where their stage was part of the recipe."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from recipes.engines.bench import BASELINE
from recipes.report.format import any_value, label_of, scaled
from recipes.report.gates import judge, kind_of, parse_all
from recipes.report.trade_offs import Z95, Dimension, Mark, interval_rows, speed_bar, trade_off_plot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from markupsafe import Markup

    from recipes.core.manifest import Manifest
    from recipes.report.gates import Verdict

ROLES = ("teacher", "pruned", "distilled")
PARAMETERS = Dimension("parameters", lambda v: scaled(v, "KMBT").replace(".0 ", " "))
DISK = Dimension("size on disk", lambda v: scaled(v, "kMGTP", "B").replace(".0 ", " "))
LATENCY = Dimension("decode latency", lambda v: f"{v:,.4g} ms")
PERPLEXITY = Dimension("perplexity", lambda v: f"{v:,.4g}")
DIVERGENCE = Dimension("KL to the teacher", lambda v: f"{v:,.3g}")
ACCURACY = Dimension("mean of the tasks", lambda v: f"{v:.1%}", higher_is_better=True)
REPORTED_ROLES = {"teacher": "teacher", "student": "distilled"}
"""A benchmark's roles, and which evaluated model each is."""
FEW = 8
"""As many candidates of a search can all be named in a plot."""

Row = dict[str, Any]


def sections(found: Mapping[str, Manifest], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What the optional inputs have to show; ``None`` for each that is not there."""

    def of(name: str) -> Mapping[str, Any]:
        return found[name].metrics if name in found else {}

    return {
        "tasks": tasks_section(of("tasks")),
        "benchmark": benchmark_section(of("benchmark")),
        "engine": engine_section(of("engine")),
        "plan": plan_section(of("plan")),
        "search": search_section(of("search")),
        "sources": sources_section(evaluation),
        "trade_offs": list(trade_offs(evaluation, of("benchmark").get("rows", []))),
        "engine_numbers": engine_numbers(of("benchmark").get("rows", [])),
    }


def is_share(task: Mapping[str, Any]) -> bool:
    """Whether a task's figures are shares of its items, as an accuracy is."""
    return all(0 <= task[role]["value"] <= 1 for role in ROLES if role in task)


def task_means(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Each model's mean over the tasks that all have as a share; every task counts the same."""
    shares = [task for task in tasks.values() if is_share(task)]
    return {
        role: sum(task[role]["value"] for task in shares) / len(shares)
        for role in ROLES
        if shares and all(role in task for task in shares)
    }


def tasks_section(metrics: Mapping[str, Any]) -> Row | None:
    """Tasks with the intervals of their scores."""
    tasks = metrics.get("tasks")
    if not tasks:
        return None
    rows = {
        name: [
            (role, float(task[role]["value"]), float(task[role].get("standard_error") or 0.0))
            for role in ROLES
            if role in task
        ]
        for name, task in tasks.items()
        if is_share(task)
    }
    title = "Score of each model in each task, with 95% intervals"
    return {
        "tasks": tasks,
        "roles": [role for role in ROLES if any(role in task for task in tasks.values())],
        "shares": set(rows),
        "means": task_means(tasks),
        "plot": interval_rows("plot-tasks", title, rows) if rows else None,
    }


def gates_section(texts: Sequence[str], found: Mapping[str, Manifest]) -> list[Verdict]:
    """Gates, as far as the page's inputs have their figures."""
    results = {manifest.kind: manifest.metrics for manifest in found.values()}
    return judge([gate for gate in parse_all(texts) if kind_of(gate) in results], results)


def benchmark_section(metrics: Mapping[str, Any]) -> Row | None:
    """Measured rows, and speed-ups beside what the machine's limits would allow."""
    rows = metrics.get("rows")
    if not rows:
        return None
    speedups = metrics.get("speedups", [])
    phases = ("prefill", "decode")
    seen = [s.get(f"{p}{end}") for s in speedups for p in phases for end in ("", "_roofline")]
    largest = 1.08 * max([1.0, *(value for value in seen if value)])
    bars = [(one, {p: _speed(one, p, largest) for p in phases if one.get(p)}) for one in speedups]
    machine = metrics.get("machine", {})
    # What is deployed is an engine, where there is one; transformers is only the measure.
    engines = [one for one in speedups if one["backend"] != BASELINE] or speedups
    best = max(engines, key=lambda one: one.get("decode") or 0.0, default=None)
    return {
        "rows": rows,
        "speedups": bars,
        "best": best if best and best.get("decode") else None,
        "machine": machine,
        "rates": machine.get("flops_per_second") or {},
    }


def _speed(one: Mapping[str, Any], phase: str, largest: float) -> Markup:
    style = "distilled" if phase == "decode" else "quiet"
    return speed_bar(one[phase], one.get(f"{phase}_roofline"), largest, style)


def engine_section(metrics: Mapping[str, Any]) -> list[tuple[str, Markup]] | None:
    """Every figure of the engine, named as its manifest names it."""
    return [(label_of(name), any_value(name, v)) for name, v in flat(metrics)] or None


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted name; lists of mappings are left to those who know them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and any(isinstance(one, dict) for one in value)):
            yield f"{prefix}{name}", value


def plan_section(metrics: Mapping[str, Any]) -> Row | None:
    """Figures and tables of the plan, as it wrote them."""
    tables = [_table(table) for table in metrics.get("tables", [])]
    figures = [(label_of(n), any_value(n, v)) for n, v in flat(metrics.get("figures", {}))]
    return {"tables": tables, "figures": figures} if tables or figures else None


def _table(table: Mapping[str, Any]) -> Row:
    columns = [str(column) for column in table["columns"]]
    return {
        "title": table["title"],
        "columns": columns,
        "numeric": [_is_numeric(column) for column in zip(*table["rows"], strict=True)],
        "rows": [list(map(any_value, columns, row)) for row in table["rows"]],
    }


def _is_numeric(column: Iterable[Any]) -> bool:
    return all(v is None or isinstance(v, int | float) for v in column)


def search_section(metrics: Mapping[str, Any]) -> Row | None:
    """Candidates of an architecture search; measured ones also as a trade-off."""
    candidates = metrics.get("candidates")
    if not candidates:
        return None
    measured = [c for c in candidates if c.get("perplexity") is not None]
    marks = [
        Mark(_label(c, measured), _fate(c), float(c["parameters"]), float(c["perplexity"]))
        for c in measured
    ]
    axes = sorted({axis for c in candidates for axis in c.get("shape", {})})
    varied = [a for a in axes if len({str(c.get("shape", {}).get(a)) for c in candidates}) > 1]
    return {
        "candidates": candidates,
        "axes": [(axis, label_of(axis)) for axis in varied],
        "measured": len(measured),
        "distilled": sum(bool(c["tokens"]) for c in measured),
        "budget": [(label_of(n), any_value(n, v)) for n, v in flat(metrics.get("budget", {}))],
        "plot": trade_off_plot("plot-search", marks, PARAMETERS, PERPLEXITY) if marks else None,
    }


def _label(candidate: Mapping[str, Any], every: Sequence[Mapping[str, Any]]) -> str:
    """Its name, unless there are so many that only the best ones' can be read."""
    shown = len(every) <= FEW or candidate.get("chosen") or candidate.get("pareto")
    return str(candidate["name"]) if shown else ""


def _fate(candidate: Mapping[str, Any]) -> str:
    return "distilled" if candidate.get("chosen") else "quiet"


def sources_section(evaluation: Mapping[str, Any]) -> Row | None:
    """Quality by source of the held-out text, where it was measured so."""
    sources = evaluation.get("sources")
    if not sources:
        return None
    roles = [role for role in ROLES if any(role in figures for figures in sources.values())]
    return {"sources": sources, "roles": roles}


def quality_mark(role: str, label: str, figures: Mapping[str, Any], cost: float) -> Mark:
    """A model's perplexity, with the interval that its loss's standard error gives."""
    spread = Z95 * (figures.get("loss_standard_error") or 0.0)
    return Mark(
        label,
        role,
        cost,
        figures["perplexity"],
        figures["perplexity"] * math.exp(-spread),
        figures["perplexity"] * math.exp(spread),
        reference=role == "teacher",
    )


def trade_offs(evaluation: Mapping[str, Any], rows: list[Row]) -> Iterator[tuple[str, str, Markup]]:
    """Title, note and plot of perplexity against each cost that was measured."""
    quality = {role: evaluation[role] for role in ROLES if role in evaluation}
    sized = [
        quality_mark(role, role, figures, figures["parameters"])
        for role, figures in quality.items()
        if figures.get("parameters")
    ]
    if sized:
        yield "Parameters", "", trade_off_plot("plot-by-parameters", sized, PARAMETERS, PERPLEXITY)
    setting = smallest_setting(rows)
    same = [row for row in rows if (row["batch_size"], row["prompt_tokens"]) == setting]
    numbers = engine_numbers(same)
    for name, title, across, cost in (
        ("plot-by-size", "Size on disk", DISK, lambda row: row.get("disk_bytes")),
        ("plot-by-latency", "Decode latency per token", LATENCY, decode_latency),
    ):
        marks = [
            quality_mark(role, numbers[engine_of(row)], quality[role], price)
            for row in same
            if (role := REPORTED_ROLES.get(row["role"], "")) in quality and (price := cost(row))
        ]
        if marks and setting:
            note = f"batch {setting[0]}, prompt of {setting[1]} tokens"
            yield title, note, trade_off_plot(name, marks, across, PERPLEXITY)


def engine_of(row: Row) -> str:
    """Backend and precision, which a benchmark's rows differ in besides their setting."""
    return f"{row['backend']} {row['precision']}"


def engine_numbers(rows: Iterable[Row]) -> dict[str, str]:
    """A number for every engine; their names would cover each other in a plot."""
    names = dict.fromkeys(engine_of(row) for row in rows)
    return {name: str(number) for number, name in enumerate(names, 1)}


def smallest_setting(rows: Iterable[Row]) -> tuple[int, int] | None:
    """Batch and prompt that say most about latency: the smallest that were measured."""
    return min(((row["batch_size"], row["prompt_tokens"]) for row in rows), default=None)


def decode_latency(row: Row) -> float | None:
    """Milliseconds for one more token of one sequence alone, from the median rate."""
    rate = (row.get("decode_tokens_per_second") or {}).get("median")
    return 1000 / rate if rate and row["batch_size"] == 1 else None
