"""Creates consoles and tables for terminals, files and pipes."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.table import Column, Table

FILE_COLUMNS = 10_000
"""Width, in characters, of output to a file or pipe. No table cell is truncated at this width."""


def screen(stderr: bool = False) -> Console:
    """Returns a console for stdout, or for stderr.

    The environment variable ``COLUMNS`` sets its width. The default is the terminal's width, or
    ``FILE_COLUMNS`` for a file or pipe.
    """
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    rich_decides = is_terminal or "COLUMNS" in os.environ
    width = None if rich_decides else FILE_COLUMNS
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=True)


def plain_table(title: str, *columns: str) -> Table:
    """Returns a table without borders. Long cells are wrapped, except in the first column."""
    first_column, *other_columns = (Column(name, overflow="fold") for name in columns)
    first_column.no_wrap = True
    return Table(first_column, *other_columns, title=title, title_justify="left", box=None)
