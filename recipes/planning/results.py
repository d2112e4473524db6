"""Result of a plan: a summary, and tables for a terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Cell = str | int | float | bool | None
"""A value of a table or of the summary."""


@dataclass(frozen=True)
class Table:
    """A table. Each row has one cell for each column, in the columns' order."""

    title: str
    columns: list[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class PlanResult:
    """What a plan expects of a run."""

    summary: dict[str, Cell]
    """Totals and assumptions by label, such as ``device-hours``."""
    tables: list[Table]
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    """Expected speed of each training run, by the name of its stage."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Expected seconds of each stage that runs models or tokenizes text, by its name."""
