"""``python launch/run.py compare RUN1 RUN2 [out=FILE]``: one page about several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes.core.errors import RecipeError

DEFAULT_OUT = "compare.html"
USAGE = "python launch/run.py compare RUN1 RUN2 [out=FILE], or one directory of a sweep"


def compare(words: Sequence[str]) -> str:
    """Writes the page that the words after ``compare`` ask for; returns what to tell the user."""
    from recipes.report.compare import render_comparison, verdict

    options = [word for word in words if word.startswith("out=")]
    paths = [Path(word) for word in words if word not in options]
    unknown = [word for word in words if word.startswith("-")]
    if not paths or len(options) > 1 or unknown:
        raise RecipeError("compare needs the directories of runs.", USAGE)
    out = Path(options[0].removeprefix("out=") if options else DEFAULT_OUT)
    if out.is_dir() or not out.parent.is_dir():
        raise RecipeError(f"out={out} cannot be written.", "name a file in a directory that exists")
    rows = render_comparison(paths, out)
    return f"{len(rows)} runs compared in {out}\n{verdict(rows)}"
