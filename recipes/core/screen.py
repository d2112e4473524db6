"""Where text for people goes."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.table import Column, Table

FILE_COLUMNS = 10_000
"""Without a terminal nothing is too wide: a table takes what it needs, and no cell is cut."""


def screen(stderr: bool = False) -> Console:
    """The terminal, as wide as it is; a file or a pipe, unless ``COLUMNS`` says how wide."""
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else FILE_COLUMNS
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=True)


def plain_table(title: str, *columns: str) -> Table:
    """A table without lines, below its title, from which nothing is cut: names stand on one line.

    What does not fit a terminal beside them goes on below.
    """
    first, *others = (Column(name, overflow="fold") for name in columns)
    first.no_wrap = True
    return Table(first, *others, title=title, title_justify="left", box=None)
