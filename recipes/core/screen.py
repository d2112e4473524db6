"""Consoles and tables for the terminal, files and pipes."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.table import Column, Table

FILE_COLUMNS = 10_000
"""Width of a file or pipe, so that no cell is truncated."""


def screen(stderr: bool = False) -> Console:
    """Returns a console with the terminal's width; ``COLUMNS`` sets the width of a file or pipe."""
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else FILE_COLUMNS
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=True)


def plain_table(title: str, *columns: str) -> Table:
    """Returns a table without lines that folds long cells, except in the first column."""
    first, *others = (Column(name, overflow="fold") for name in columns)
    first.no_wrap = True
    return Table(first, *others, title=title, title_justify="left", box=None)
