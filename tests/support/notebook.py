"""Runs notebooks without Jupyter."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path


def run_notebook(
    path: Path, parameters: Mapping[str, object]
) -> tuple[list[object], dict[str, object]]:
    """Runs the code cells of a notebook in order.

    The cell with the tag ``parameters`` is not run. Its variables get the values of the argument
    ``parameters`` instead.

    Returns:
        The value that each run cell shows (``None`` if it shows none), and all variables by name.
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
    """Runs a cell and returns the value that a notebook would show.

    This is the value of the last statement, if that is an expression, and otherwise ``None``.
    """
    tree = ast.parse(source)
    last_expression = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), variables)
    if not isinstance(last_expression, ast.Expr):
        return None
    return eval(compile(ast.Expression(last_expression.value), "<cell>", "eval"), variables)
