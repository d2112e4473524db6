"""Tests the width of tables on a terminal and in a pipe."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from recipes.core.screen import plain_table, screen

CELL = "feed-forward width " * 12
"""Wider than the 80 columns of an ordinary terminal."""


@pytest.mark.parametrize(("columns", "is_complete"), [(None, True), ("80", False)])
def test_a_piped_table_is_truncated_only_if_the_variable_columns_is_set(
    columns: str | None,
    is_complete: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    table = Table("shape", box=None)
    table.add_row(CELL)
    screen().print(table)
    assert (CELL.strip() in capsys.readouterr().out) == is_complete


def test_on_a_narrow_console_cells_are_folded_except_in_the_first_column() -> None:
    name, status, path = "sweeps/2026-11-26_16-00-58/0", "failed at evaluate", "/a/long/path/" * 4
    table = plain_table("runs", "run", "status", "folder")
    table.add_row(name, status, path)
    output = StringIO()
    Console(file=output, width=60).print(table)
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    assert max(map(len, lines)) <= 60
    assert any(line.startswith(f" {name} ") for line in lines)
    # The first two lines are the title and the header. Each later line ends with a piece of the
    # path.
    assert "".join(line.split()[-1] for line in lines[2:]) == path
