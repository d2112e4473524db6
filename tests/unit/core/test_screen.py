"""Tests the width of tables on a terminal and in a pipe."""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from recipes.core.screen import plain_table

CELL = "feed-forward width " * 12
"""Wider than the 80 columns of an ordinary terminal."""
PRINT_TABLE = f"""
from rich.table import Table
from recipes.core.screen import screen
table = Table("shape", box=None)
table.add_row("{CELL}")
screen().print(table)
"""


@pytest.mark.parametrize(("environment", "is_complete"), [({}, True), ({"COLUMNS": "80"}, False)])
def test_a_piped_table_is_truncated_only_if_the_variable_columns_is_set(
    environment: dict[str, str], is_complete: bool
) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.run(
        [sys.executable, "-c", PRINT_TABLE],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (CELL.strip() in process.stdout) == is_complete


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
