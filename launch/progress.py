"""Progress of running stages, and the remaining time of stages and runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from launch.plan import Plan
from launch.planned import SKIP, PlannedStage
from recipes.core.manifest import read_manifest
from recipes.core.metrics import METRICS, Record, new_records
from recipes.planning.results import PlanResult

SPEED_RECORDS = 50
"""Number of records (lines of ``metrics.jsonl``) over which a task's speed is measured."""
OVERHEAD_SECONDS = 10.0
"""Assumed time of a stage for imports and files, in addition to its planned time."""
LINE_SECONDS = 15.0
"""Time between lines of progress where there is no terminal."""
SHOWN_METRICS = ("loss", "val_loss", "val_kd", "tokens_per_second")


def remaining_seconds(records: Sequence[Record]) -> int | None:
    """Returns the remaining seconds of the last record's task; ``None`` if the speed is unknown."""
    last = records[-1]
    recent: list[Record] = []
    for record in records:
        if record["task"] == last["task"]:
            if recent and record["done"] <= recent[-1]["done"]:
                recent.clear()  # restarted at an earlier step: only newer records show the speed
            recent.append(record)
    recent = recent[-SPEED_RECORDS:]
    if len(recent) < 2:
        return None
    elapsed, done = (recent[-1][key] - recent[0][key] for key in ("time", "done"))
    seconds: int = round(elapsed / done * (last["total"] - last["done"]))
    return seconds


def planned_seconds(run_dir: Path) -> Mapping[str, float]:
    """Returns the planned seconds of each stage; empty if the run has no result of ``plan``."""
    manifest = read_manifest(run_dir / "plan")
    result = manifest.result_if("plan", PlanResult) if manifest else None
    return result.seconds if result else {}


def remaining_run_seconds(
    planned: Mapping[str, float], spent: Mapping[str, float], remaining: Mapping[str, float | None]
) -> float | None:
    """Returns a run's remaining seconds; ``None`` if it is complete or has no planned times.

    Args:
        planned: Planned seconds of each stage.
        spent: Measured seconds of each complete stage. They show how fast this machine is.
        remaining: Remaining seconds of each other stage; ``None`` if it has no progress yet.
    """
    if not planned or not remaining:
        return None
    expected = {s: OVERHEAD_SECONDS + planned.get(s, 0.0) for s in (*spent, *remaining)}
    # How many times longer than expected the complete stages took.
    pace = sum(spent.values()) / sum(expected[s] for s in spent) if spent else 1.0
    return sum(pace * expected[s] if left is None else left for s, left in remaining.items())


def run_estimate(plan: Plan, stage: PlannedStage) -> Callable[[float], float | None]:
    """Returns a function that estimates a run's remaining seconds from those of a running stage."""
    planned = planned_seconds(plan.run_dir)
    index = plan.stages.index(stage)
    later = [other.name for other in plan.stages[index + 1 :] if other.action != SKIP]
    finished = [other for other in plan.stages if other.name not in (stage.name, *later)]
    spent = {other.name: result.seconds for other in finished if (result := other.result)}
    no_progress = dict.fromkeys(later)
    return lambda left: remaining_run_seconds(planned, spent, {stage.name: left, **no_progress})


def format_seconds(seconds: float) -> str:
    """Returns hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


class Follower:
    """Shows the progress that a stage writes to its ``metrics.jsonl``, and its remaining time.

    On a terminal it draws a bar. Elsewhere it prints a line every few seconds.
    """

    def __init__(
        self,
        stage: PlannedStage,
        console: Console,
        run_estimate: Callable[[float], float | None] = lambda left: None,
    ) -> None:
        self._name, self._path = stage.name, stage.directory / METRICS
        self._console, self._run_estimate = console, run_estimate
        # Twice ``SPEED_RECORDS``, because records of other tasks, such as validation, intervene.
        self._recent = deque[Record](maxlen=2 * SPEED_RECORDS)
        # Skip the old records of a resumed stage, which appends to its file.
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
        """Reads the new records and shows them."""
        records, self._position = new_records(self._path, self._position)
        for record in records:
            self._show(record)

    def _show(self, record: Record) -> None:
        task, done, total = record["task"], record["done"], record["total"]
        self._recent.append(record)
        metrics = {k: record[k] for k in SHOWN_METRICS if record.get(k) is not None}
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if self._console.is_terminal:
            columns: dict[str, Any] = {"left": self._time_left(), "values": values}
            if task not in self._tasks:
                self._tasks[task] = self._progress.add_task(
                    task, total=total, stage=self._name, **columns
                )
            self._progress.update(self._tasks[task], completed=done, total=total, **columns)
        elif done == total or time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            progress = ", ".join(filter(None, (f"{task} {done}/{total}", self._time_left())))
            self._console.print(f"{self._name}: {progress}  {values}".rstrip())

    def _time_left(self) -> str:
        stage_seconds = remaining_seconds(self._recent)
        texts = [f"{format_seconds(stage_seconds)} left"] if stage_seconds else []
        if stage_seconds is not None and (run_seconds := self._run_estimate(stage_seconds)):
            texts.append(f"about {format_seconds(run_seconds)} for the run")
        return ", ".join(texts)
