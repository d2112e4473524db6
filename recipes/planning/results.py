"""Result of a plan: a summary, and tables for a terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """A table. Each row has a cell for each column."""

    title: str
    columns: list[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class PlanResult:
    """Summary by name, such as ``device-hours``, and tables."""

    summary: dict[str, Cell]
    tables: list[Table]
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    """Speed of each training run, by stage."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Estimated computing time of each stage that runs models or tokenizes text."""
