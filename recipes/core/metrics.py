"""Progress and metrics of a running stage, as JSON lines.

The stage appends records. The launcher, which may run on another machine, and the process of a
tracker read new records while the stage runs. The report plots all records.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.core.files import json_text
from recipes.core.watchdog import report_progress

METRICS = "metrics.jsonl"
RESULT_METRICS = "result_metrics.jsonl"
"""Metrics of the old result while the stage runs again. The new start writes ``METRICS``."""
ProgressCallback = Callable[[int, int], None]
"""Called with the numbers of finished and of all units of work."""
Record = dict[str, Any]
"""One line of a metrics file."""


class MetricsLog:
    """Appends records to a metrics file. Without a path, as on ranks above 0, writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1) if path else None
        if self._file and path and path.read_bytes()[-1:] not in (b"", b"\n"):
            self._file.write("\n")  # a kill truncated the last line

    def log(self, **values: object) -> None:
        """Appends a record with the values and the time, and restarts the watchdog's timeout."""
        report_progress()
        if self._file:
            record = {"time": round(time.time(), 3), **values}
            self._file.write(json_text(record, lambda number: None) + "\n")  # null for NaN and inf

    def progress(self, task: str, done: int, total: int, **values: object) -> None:
        """Appends a progress record: ``done`` of ``total`` steps of ``task`` are finished."""
        self.log(task=task, done=done, total=total, **values)


def new_records(path: Path, position: int) -> tuple[list[Record], int]:
    """Reads the progress records that were appended to a file since the last call.

    ``position`` is 0 in the first call, and then the position that the last call returned. Returns
    the new records that have a task, and the position in bytes for the next call.
    """
    size = path.stat().st_size if path.exists() else 0
    if size < position:  # the stage has started over and deleted its old records
        position = 0
    records: list[Record] = []
    if size == position:
        return records, position
    with path.open("rb") as file:
        file.seek(position)
        for line in file:
            if not line.endswith(b"\n"):
                break  # the record is still being written
            position += len(line)
            with contextlib.suppress(ValueError):  # a kill or a full disk truncated the record
                records.append(json.loads(line))
    return [record for record in records if "task" in record], position


def result_metrics(stage_dir: Path) -> Path:
    """Returns the metrics file of the start that made the stage's result."""
    path = stage_dir / RESULT_METRICS
    return path if path.exists() else stage_dir / METRICS


def read_records(path: Path) -> Iterator[Record]:
    """Yields the records of a metrics file. Skips lines that a kill truncated."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def steps_of(path: Path, task: str) -> list[Record]:
    """Returns the last progress record of each step of a task, sorted by step."""
    # A step has several records if a restart repeated it.
    by_step = {r["done"]: r for r in read_records(path) if r.get("task") == task}
    return [by_step[step] for step in sorted(by_step)]


def flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields the dotted name and the value of each entry of nested dicts, such as ("a.b", 1)."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
