"""A page that sets several runs side by side: figures, Pareto fronts, and what was different."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from recipes.core.errors import RecipeError
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
    decode_latency,
    engine_of,
    quality_mark,
    smallest_setting,
    task_means,
)
from recipes.report.trade_offs import Mark, front_of, trade_off_plot

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

TEMPLATE = "compare.html.j2"
QUALITIES = {"perplexity": PERPLEXITY, "kl": DIVERGENCE, "tasks": ACCURACY}
COSTS = {"parameters": PARAMETERS, "disk": DISK, "latency": LATENCY}
Row = dict[str, Any]


def render_comparison(paths: Iterable[Path], out: Path) -> int:
    """Writes the comparison page and returns how many runs it compares.

    Args:
        paths: Run directories, or directories with runs below them.
        out: File to write.

    Raises:
        RecipeError: There are not two runs to compare.
    """
    runs = [read_run(path) for path in find_runs(paths)]
    content = comparison(runs)
    render_template(TEMPLATE, content, out)
    return len(content["rows"])


def comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Everything that the page shows."""
    measured = [run for run in runs if run.evaluation is not None]
    text = common_text(measured)
    same = [run for run in measured if run.text() == text]
    if len(same) < 2:
        raise RecipeError(
            f"of {len(runs)} run{'s' * (len(runs) != 1)}, {len(measured)} came to an evaluation "
            f"and {len(same)} of them on the same held-out text; there is nothing to compare.",
            "give two or more complete runs of the same data",
        )
    names = _names(runs)
    best = min(same, key=lambda run: run.evaluation["distilled"]["loss"])  # type: ignore[index]
    engine = _common_engine(same)
    rows = [_row(run, names, best if run in same else None, engine) for run in measured]
    for number, row in enumerate(rows, 1):
        row["number"] = str(number)
    comparable = [row for row in rows if row["comparable"]]
    plots = [plot for quality in QUALITIES for plot in _plots(quality, comparable)]
    return {
        "title": f"Comparison of {len(measured)} runs",
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "rows": rows,
        "best": names[best.path],
        "teacher": (best.evaluation or {}).get("teacher", {}),
        "teacher_tasks": next((r["teacher_tasks"] for r in comparable if r["teacher_tasks"]), None),
        "plots": plots,
        "engine": engine,
        "others": [row for row in rows if not row["comparable"]],
        "incomplete": [(names[run.path], run) for run in runs if run.incomplete],
        "unmeasured": [names[run.path] for run in runs if run.evaluation is None],
        "differences": [
            (name, [any_value(name.rpartition(".")[2], value) for value in values])
            for name, values in differing_settings(measured)
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


def _row(run: RunRecord, names: dict[Path, str], best: RunRecord | None, engine: Row | None) -> Row:
    figures = run.evaluation or {}
    distilled = figures["distilled"]
    tasks = run.find("task_results")
    exported = run.exported
    training = next((m for m in run.stages.values() if m.stage == "distill"), None)
    return {
        "name": names[run.path],
        "recipe": run.recipe,
        "comparable": best is not None,
        "figures": distilled,
        "recovered": figures.get("recovered"),
        "gap": paired_difference(run.losses, best.losses) if best and best is not run else None,
        "is_best": best is run,
        "perplexity": distilled["perplexity"],
        "kl": distilled.get("kl_to_teacher"),
        "tasks": task_means(tasks.metrics["tasks"]).get("distilled") if tasks else None,
        "teacher_tasks": task_means(tasks.metrics["tasks"]).get("teacher") if tasks else None,
        "teacher": figures.get("teacher", {}),
        "parameters": distilled.get("parameters") or (training.parameters if training else None),
        "disk": exported.total_bytes() if exported else None,
        "latency": _latency(run, engine),
        "tokens": training.metrics.get("tokens") if training else None,
        "hours": sum(map(machine_hours, run.stages.values())),
        "fronts": [],
    }


def _student_rows(run: RunRecord) -> list[Row]:
    found = run.find("benchmark_results")
    rows = found.metrics.get("rows", []) if found else []
    setting = smallest_setting(rows)
    return [
        row
        for row in rows
        if row["role"] == "student" and (row["batch_size"], row["prompt_tokens"]) == setting
    ]


def _common_engine(runs: Sequence[RunRecord]) -> Row | None:
    """The engine, setting and machine whose latencies are compared.

    The first benchmarked run's fastest engine; a run that was not measured so has no latency here.
    """
    for run in runs:
        rows = [row for row in _student_rows(run) if decode_latency(row)]
        if rows:
            row = min(rows, key=lambda one: decode_latency(one) or 0.0)
            return {"name": engine_of(row), "machine": _machine(run), **_setting(row)}
    return None


def _setting(row: Row) -> Row:
    return {name: row[name] for name in ("batch_size", "prompt_tokens")}


def _machine(run: RunRecord) -> tuple[Any, Any]:
    found = run.find("benchmark_results")
    machine = found.metrics.get("machine", {}) if found else {}
    return machine.get("cpu") or machine.get("gpu"), machine.get("threads")


def _latency(run: RunRecord, engine: Row | None) -> float | None:
    if engine is None or _machine(run) != engine["machine"]:
        return None
    wanted = {name: engine[name] for name in ("batch_size", "prompt_tokens")}
    for row in _student_rows(run):
        if engine_of(row) == engine["name"] and _setting(row) == wanted:
            return decode_latency(row)
    return None


def _plots(quality: str, rows: list[Row]) -> list[Row]:
    """One quality against each cost that at least two runs have; notes who is on the front."""
    up, plots = QUALITIES[quality], []
    for cost, across in COSTS.items():
        chosen = [row for row in rows if row[quality] is not None and row[cost] is not None]
        if len(chosen) < 2:
            continue
        marks = [_mark(row, quality, cost) for row in chosen]
        for index in front_of(marks, up):
            chosen[index]["fronts"].append((quality, cost))
        plots.append(
            {
                "title": f"{up.title.capitalize()} against {across.title}".replace("Kl", "KL"),
                "plot": trade_off_plot(
                    f"plot-{quality}-{cost}", [*marks, *_teacher(chosen, quality, cost)], across, up
                ),
            }
        )
    return plots


def _mark(row: Row, quality: str, cost: str) -> Mark:
    if quality == "perplexity":
        return quality_mark("distilled", row["number"], row["figures"], row[cost])
    return Mark(row["number"], "distilled", row[cost], row[quality])


def _teacher(rows: list[Row], quality: str, cost: str) -> list[Mark]:
    """The teacher as a reference where all runs have the same one and its cost is known."""
    figures = [row["teacher"] for row in rows]
    if cost != "parameters" or quality == "kl" or any(one != figures[0] for one in figures):
        return []
    value = rows[0]["teacher_tasks"] if quality == "tasks" else figures[0].get("perplexity")
    size = figures[0].get("parameters")
    if value is None or size is None:
        return []
    return [Mark("teacher", "teacher", size, value, reference=True)]
