"""Creates consoles and tables for terminals, files and pipes."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.table import Column, Table

FILE_COLUMNS = 10_000
"""Default width of a file or pipe: so wide that no cell is truncated."""


def screen(stderr: bool = False) -> Console:
    """Returns a console with the terminal's width. The variable ``COLUMNS`` sets another width."""
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else FILE_COLUMNS
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=True)


def plain_table(title: str, *columns: str) -> Table:
    """Returns a table without borders. Long cells are folded, except in the first column."""
    first, *others = (Column(name, overflow="fold") for name in columns)
    first.no_wrap = True
    return Table(first, *others, title=title, title_justify="left", box=None)
