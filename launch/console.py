"""Prints the plan, the progress of running stages, and the summary."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from launch.plan import Plan
from launch.planned import PlannedStage
from launch.time_left import RECENT, in_words, seconds_left
from launch.trackers import Track
from recipes.core.manifest import Manifest, read_manifest
from recipes.core.metrics import METRICS, Record
from recipes.core.screen import plain_table
from recipes.data.results import DatasetResult
from recipes.data.results import in_words as conversations_in_words
from recipes.engines.results import BenchmarkResults, EngineResult
from recipes.evaluation.results import ROLES, EvaluationResult, TaskResults
from recipes.planning.results import Cell, PlanResult
from recipes.pruning.results import HealResult
from recipes.report.settings import REPORT_FILE
from recipes.search.results import LatencyResult, SearchResult

PLAIN_INTERVAL = 15.0
"""Seconds between lines of progress where there is no terminal."""
SHOWN = ("loss", "val_loss", "val_kd", "tokens_per_second")


def print_recipes(recipes: Mapping[str, str], console: Console) -> None:
    """Lists the recipes, one line each."""
    table = Table(title="recipes", title_justify="left", box=None, show_header=False)
    for name, description in recipes.items():
        table.add_row(f"[bold]{name}", description)
    console.print(table)
    console.print("Choose one: python launch/run.py recipe=NAME   (--help shows more)")


def print_plan(plan: Plan, console: Console) -> None:
    """Shows what will run and why, before anything does."""
    table = plain_table(f"plan for {plan.run_dir}", "stage", "action", "why")
    for stage in plan.stages:
        style = "dim" if stage.action == "skip" else "bold"
        table.add_row(f"[{style}]{stage.name}", stage.action, escape(stage.reason))
    console.print(table)


def print_notes(plan: Plan, skip_rules: Collection[str], console: Console) -> None:
    """Shows warnings, and errors of rules that are skipped."""
    for note in plan.notes:
        how = "skipped" if note.rule.name in skip_rules else note.rule.severity
        console.print(f"{how}: {note}", markup=False, style="dim" if how == "skipped" else "yellow")


def print_tables(plan: Plan, console: Console) -> None:
    """Shows the tables of planning stages, if they ran or are the only stages."""
    for stage in plan.stages:
        manifest = read_manifest(stage.directory)
        alone = stage in plan.todo() or len(plan.stages) == 1
        if manifest is None or manifest.kind not in ("plan", "shapes") or not alone:
            continue
        for made in manifest.result(PlanResult).tables:
            table = plain_table(made.title, *made.columns)
            for row in made.rows:
                table.add_row(*(escape(cell_text(cell)) for cell in row))
            console.print(table)


def cell_text(cell: Cell) -> str:
    """A table's value: whole numbers in full, others in four digits."""
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:,.4g}" if isinstance(cell, float) else str(cell)


def print_summary(plan: Plan, seconds: float, console: Console) -> None:
    """Shows what every stage cost and produced."""
    ran = {stage.name for stage in plan.todo()}
    table = plain_table("summary", "stage", "", "time", "peak memory", "size", "result")
    for stage in plan.stages:
        manifest = read_manifest(stage.directory)
        if manifest is None:
            table.add_row(stage.name, "incomplete")
            continue
        table.add_row(
            stage.name,
            "ran" if stage.name in ran else "skipped",
            f"{manifest.seconds:.0f} s",
            f"{manifest.peak_rss_bytes / 1e9:.1f} GB",
            f"{manifest.total_bytes() / 1e6:.1f} MB",
            headline(manifest),
        )
    console.print(table)
    stages = f"{len(ran)} stage{'s' * (len(ran) != 1)} ran"
    console.print(f"{stages if ran else 'everything was complete, nothing ran'}; {seconds:.1f} s")


def headline(manifest: Manifest) -> str:
    """Returns the most important result of a stage."""
    if manifest.kind in HEADLINES:
        return HEADLINES[manifest.kind](manifest)
    if healed := manifest.result_if("heal", HealResult):
        return f"KL {healed.kl_pruned:.3f} → {healed.kl_healed:.3f} on validation text"
    size = f"{manifest.parameters / 1e6:.1f} M parameters" if manifest.parameters else ""
    return ", ".join(filter(None, (size, manifest.metrics.get("stopped"))))


def _tokens(manifest: Manifest) -> str:
    data = manifest.result(DatasetResult)
    chats = [f"; of {name}, {conversations_in_words(n)}" for name, n in data.conversations.items()]
    return f"{sum(data.tokens.values()):,} tokens{''.join(chats)}"


def _perplexities(manifest: Manifest) -> str:
    result = manifest.result(EvaluationResult)
    text = " → ".join(f"{quality.perplexity:.1f}" for quality in result.models().values())
    share = result.recovered
    said = "" if share is None else f", recovered {share:.0%} of the loss added by pruning"
    return f"perplexity {text}{said}"


def _mean_score(manifest: Manifest) -> str:
    tasks = [task.models() for task in manifest.result(TaskResults).tasks.values()]
    means = (sum(task[role].value for task in tasks) / len(tasks) for role in ROLES)
    return f"mean score {' → '.join(f'{value:.3f}' for value in means)}"


def _cost(manifest: Manifest) -> str:
    f = manifest.result(PlanResult).figures
    return f"{f['device-hours']:,} device-hours on {f['hardware']}, ${f['dollars']:,}"


def _best_candidate(manifest: Manifest) -> str:
    """Names the candidate that successive halving chose, or else the first of the ranking."""
    result = manifest.result(SearchResult)
    best = result.chosen() or result.candidates[0]
    return f"{best.name}, KL {best.kl_to_teacher:.3f}, {len(result.candidates)} shapes"


def _latency(manifest: Manifest) -> str:
    """States the error of a fitted line on shapes that it was not fitted to, or else on all."""
    shapes = manifest.result(LatencyResult).shapes
    error = max(abs(s.error) for s in [s for s in shapes if not s.seen] or shapes)
    return f"teacher {shapes[0].step_ms:.3g} ms a step, fitted within {error:.0%}"


def _engine(manifest: Manifest) -> str:
    result = manifest.result(EngineResult)
    return f"{result.backend} {result.precision}"


def _speedup(manifest: Manifest) -> str:
    """Returns the student's speed-up in the first cell of the grid."""
    first = manifest.result(BenchmarkResults).speedups[0]
    return (
        f"{first.prefill:.2f} × prefill, {first.decode:.2f} × decode "
        f"({first.backend}, batch {first.batch_size})"
    )


HEADLINES: Mapping[str, Callable[[Manifest], str]] = {
    "dataset": _tokens,
    "eval_results": _perplexities,
    "task_results": _mean_score,
    "plan": _cost,
    "shapes": lambda m: f"{m.result(PlanResult).figures['shapes']} shapes",
    "latency_model": _latency,
    "search_results": _best_candidate,
    "engine": _engine,
    "speed_results": _speedup,
    "report": lambda m: REPORT_FILE,
}
"""By kind of artifact."""


class Follower:
    """Draws the progress that a stage writes to its ``metrics.jsonl``.

    A bar on a terminal, a line every few seconds elsewhere, both with the remaining time; a tracker
    gets every record.
    """

    def __init__(
        self,
        stage: PlannedStage,
        console: Console,
        track: Track = lambda record: None,
        run_left: Callable[[float], float | None] = lambda left: None,
    ) -> None:
        self._name, self._path = stage.name, stage.directory / METRICS
        self._console, self._track, self._run_left = console, track, run_left
        self._recent = deque[Record](maxlen=2 * RECENT)
        # A stage that resumes appends to the same file, whose old records are no news.
        self._position = self._path.stat().st_size if self._path.exists() else 0
        self._last_line, self._started = 0.0, time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]{task.fields[stage]}"),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[values]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        if not self._console.is_terminal:
            self._console.print(f"{self._name}: started")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.stop()
        if kind is None:
            seconds = time.monotonic() - self._started
            self._console.print(f"{self._name}: complete in {seconds:.0f} s")

    def update(self) -> None:
        """Reads new records and draws them."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size < self._position:  # work of another fingerprint was deleted
            self._position = 0
        if size == self._position:
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._position += len(line)
                try:
                    record = json.loads(line)
                except ValueError:  # a record that a kill, or a full disk, cut short
                    continue
                if "task" in record:
                    self._track(record)
                    self._draw(record)

    def _draw(self, record: Record) -> None:
        task, done, total = record["task"], record["done"], record["total"]
        self._recent.append(record)
        values = "  ".join(f"{k} {record[k]:.4g}" for k in SHOWN if record.get(k) is not None)
        if self._console.is_terminal:
            shown: dict[str, Any] = {"left": self._time_left(), "values": values}
            if task not in self._tasks:
                self._tasks[task] = self._progress.add_task(
                    task, total=total, stage=self._name, **shown
                )
            self._progress.update(self._tasks[task], completed=done, total=total, **shown)
        elif done == total or time.monotonic() - self._last_line > PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            progress = ", ".join(filter(None, (f"{task} {done}/{total}", self._time_left())))
            self._console.print(f"{self._name}: {progress}  {values}".rstrip())

    def _time_left(self) -> str:
        """Says how long the current task, and the run, will still take."""
        task = seconds_left(self._recent)
        parts = [f"{in_words(task)} left"] if task else []
        if task is not None and (run := self._run_left(task)):
            parts.append(f"about {in_words(run)} of the run")
        return ", ".join(parts)
