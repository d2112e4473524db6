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
SHOW = f"""
from rich.table import Table
from recipes.core.screen import screen
table = Table("shape", box=None)
table.add_row("{CELL}")
screen().print(table)
"""


@pytest.mark.parametrize(("variables", "is_whole"), [({}, True), ({"COLUMNS": "80"}, False)])
def test_a_piped_table_is_truncated_only_if_the_variable_columns_is_set(
    variables: dict[str, str], is_whole: bool
) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (CELL.strip() in done.stdout) == is_whole


def test_on_a_narrow_console_cells_are_folded_but_names_are_not() -> None:
    name, state, path = "sweeps/2026-11-26_16-00-58/0", "failed at evaluate", "/a/long/path/" * 4
    table = plain_table("runs", "run", "state", "folder")
    table.add_row(name, state, path)
    output = StringIO()
    Console(file=output, width=60).print(table)
    rows = [line.rstrip() for line in output.getvalue().splitlines()]
    assert max(map(len, rows)) <= 60
    assert any(row.startswith(f" {name} ") for row in rows)
    # The first two rows are the title and the header. The last column has the folded path.
    assert "".join(row.split()[-1] for row in rows[2:]) == path
