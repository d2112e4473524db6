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
"""Number of records (lines of ``metrics.jsonl``) over which the speed of a task is measured. A
stage has one or more tasks, such as training and validation."""
OVERHEAD_SECONDS = 10.0
"""Assumed time of a stage for imports and files, in addition to its planned time."""
LINE_SECONDS = 15.0
"""Minimum time between lines of progress where there is no terminal."""
SHOWN_METRICS = ("loss", "val_loss", "val_kd", "tokens_per_second")
"""Metrics that appear next to the progress, if the record has them."""


def remaining_seconds(records: Sequence[Record]) -> int | None:
    """Returns the remaining seconds of the last record's task.

    Returns ``None`` until the task has two records since its last restart.
    """
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
    seconds_per_step = (last["time"] - recent[0]["time"]) / (last["done"] - recent[0]["done"])
    return round(float(seconds_per_step * (last["total"] - last["done"])))


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
        planned: Planned seconds of each stage, without ``OVERHEAD_SECONDS``.
        spent: Measured seconds of each complete stage, which show how fast this machine is.
        remaining: Remaining seconds of each incomplete stage; ``None`` before its first progress.
    """
    if not planned or not remaining:
        return None
    expected = {s: OVERHEAD_SECONDS + planned.get(s, 0.0) for s in (*spent, *remaining)}
    # Measured seconds divided by expected seconds, over all complete stages.
    slowdown = sum(spent.values()) / sum(expected[s] for s in spent) if spent else 1.0
    return sum(
        slowdown * expected[stage] if seconds is None else seconds
        for stage, seconds in remaining.items()
    )


def run_estimate(plan: Plan, stage: PlannedStage) -> Callable[[float], float | None]:
    """Returns a function that estimates the run's remaining seconds from those of ``stage``.

    The function returns ``None`` if the run has no planned times.
    """
    planned = planned_seconds(plan.run_dir)
    index = plan.stages.index(stage)
    later = [s.name for s in plan.stages[index + 1 :] if s.action != SKIP]
    finished = [s for s in plan.stages if s.name not in (stage.name, *later)]
    spent = {s.name: result.seconds for s in finished if (result := s.result)}
    no_progress = dict.fromkeys(later)  # each value is None: the stage has no progress yet

    def estimate(stage_seconds: float) -> float | None:
        return remaining_run_seconds(planned, spent, {stage.name: stage_seconds, **no_progress})

    return estimate


def format_seconds(seconds: float) -> str:
    """Formats a duration as hours, minutes and seconds, such as ``1:02:05``."""
    return str(timedelta(seconds=round(seconds)))


class Follower:
    """Shows the progress that a stage writes to its ``metrics.jsonl``, and its remaining time.

    On a terminal it draws a bar. Elsewhere it prints a line every ``LINE_SECONDS``.
    ``run_estimate`` takes the stage's remaining seconds and returns those of the run. If it returns
    ``None``, no time is shown for the run.
    """

    def __init__(
        self,
        stage: PlannedStage,
        console: Console,
        run_estimate: Callable[[float], float | None] = lambda stage_seconds: None,
    ) -> None:
        self._name, self._path = stage.name, stage.directory / METRICS
        self._console, self._run_estimate = console, run_estimate
        # Twice ``SPEED_RECORDS``, because the records of two tasks alternate: training, validation.
        self._recent = deque[Record](maxlen=2 * SPEED_RECORDS)
        # Starts at the end of the file, because a resumed stage appends to its old records.
        self._position = self._path.stat().st_size if self._path.exists() else 0
        self._last_line_time, self._start_time = 0.0, time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]{task.fields[stage]}"),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[time_left]}"),
            TextColumn("{task.fields[values]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, Any] = {}  # rich's task ids, by task of the stage

    def __enter__(self) -> Self:
        self._progress.start()
        if not self._console.is_terminal:
            self._console.print(f"{self._name}: started")
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._progress.stop()
        if error_type is None:
            seconds = time.monotonic() - self._start_time
            self._console.print(f"{self._name}: complete in {seconds:.0f} s")

    def update(self) -> None:
        """Reads the new records and shows them."""
        records, self._position = new_records(self._path, self._position)
        for record in records:
            self._show(record)

    def _show(self, record: Record) -> None:
        task, done, total = record["task"], record["done"], record["total"]
        self._recent.append(record)
        names = [name for name in SHOWN_METRICS if record.get(name) is not None]
        values = "  ".join(f"{name} {record[name]:.4g}" for name in names)
        if self._console.is_terminal:
            columns: dict[str, Any] = {"time_left": self._time_left(), "values": values}
            if task not in self._bars:
                bar = self._progress.add_task(task, total=total, stage=self._name, **columns)
                self._bars[task] = bar
            self._progress.update(self._bars[task], completed=done, total=total, **columns)
        elif done == total or time.monotonic() - self._last_line_time > LINE_SECONDS:
            self._last_line_time = time.monotonic()
            progress = ", ".join(filter(None, (f"{task} {done}/{total}", self._time_left())))
            self._console.print(f"{self._name}: {progress}  {values}".rstrip())

    def _time_left(self) -> str:
        """Returns the remaining times of the task and the run; omits zero and unknown times."""
        stage_seconds = remaining_seconds(self._recent)
        texts = [f"{format_seconds(stage_seconds)} left"] if stage_seconds else []
        if stage_seconds is not None and (run_seconds := self._run_estimate(stage_seconds)):
            texts.append(f"about {format_seconds(run_seconds)} for the run")
        return ", ".join(texts)
