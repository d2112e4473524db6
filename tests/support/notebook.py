"""Runs notebooks without Jupyter."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path


def run_notebook(
    path: Path, parameters: Mapping[str, object]
) -> tuple[list[object], dict[str, object]]:
    """Runs all cells in order; ``parameters`` replace the cell with the tag ``parameters``.

    Returns:
        The value that each cell shows, and all variables.
    """
    variables: dict[str, object] = {}
    shown = []
    for cell in json.loads(path.read_text())["cells"]:
        if "parameters" in cell["metadata"].get("tags", ()):
            variables |= parameters
        elif cell["cell_type"] == "code":
            shown.append(_run_cell("".join(cell["source"]), variables))
    return shown, variables


def _run_cell(source: str, variables: dict[str, object]) -> object:
    """Runs a cell; returns the value of its last line, which a notebook shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), variables)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), variables)
