"""Progress and metrics of a running stage, as JSON lines that anything can follow.

The stage appends; the launcher, on this machine or another, tails the file and draws. So a bar, a
plain log and a plot in the report all come from one record.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.core.watchdog import report_progress

METRICS = "metrics.jsonl"
ProgressCallback = Callable[[int, int], None]
"""Takes the units of work that are done, and their total."""
Record = dict[str, Any]
"""One line of it."""


class MetricsLog:
    """Appends records to ``metrics.jsonl``. Rank 0 only; other ranks pass ``path=None``."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1) if path else None
        if self._file and _cut_short(path):
            self._file.write("\n")

    def log(self, **values: object) -> None:
        """Appends one record, stamped with the time."""
        report_progress()
        if self._file:
            self._file.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")

    def progress(self, task: str, done: int, total: int, **values: object) -> None:
        """Appends a record of work done: ``done`` of ``total`` units of ``task``."""
        self.log(task=task, done=done, total=total, **values)


def _cut_short(path: Path | None) -> bool:
    """Whether a killed process left the last line unfinished."""
    content = path.read_bytes() if path else b""
    return bool(content) and not content.endswith(b"\n")


def read_records(path: Path) -> Iterator[Record]:
    """Yields the records of a metrics file; a last line cut short by a kill is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def steps_of(path: Path, task: str) -> list[Record]:
    """Records of ``task``, one per step; of a step done again after a restart, the last counts."""
    latest = {r["done"]: r for r in read_records(path) if r.get("task") == task}
    return [latest[step] for step in sorted(latest)]


def flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested values by dotted name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
