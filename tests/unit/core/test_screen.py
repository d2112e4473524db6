"""What is printed for people, on a terminal and into a file."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CELL = "feed-forward width " * 12
SHOW = f"""
from rich.table import Table
from recipes.core.screen import screen
table = Table("shape", box=None)
table.add_row("{CELL}")
screen().print(table)
"""


@pytest.mark.parametrize(("asked", "whole"), [({}, True), ({"COLUMNS": "80"}, False)])
def test_a_piped_table_is_as_wide_as_it_needs(asked: dict[str, str], whole: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | asked
    shown = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True
    )
    assert (CELL.strip() in shown.stdout) == whole
