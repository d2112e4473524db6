"""Tiny real models and real text, made once per session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    output: str


def run_recipe(*overrides: str, cwd: Path, timeout: float = 600) -> Result:
    """Runs the launcher as a user would, in a directory of its own."""
    done = subprocess.run(
        [sys.executable, str(REPO / "launch" / "run.py"), *overrides],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "COLUMNS": "160"},
        check=False,
    )
    return Result(done.returncode, done.stdout + done.stderr)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real English prose: the language reference that comes with Python."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    paragraphs = [p for topic in topics.values() for p in topic.split("\n\n") if len(p) > 200]
    path.write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs[:1200]))
    return path
