"""Tiny real models and real text, made once per session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from recipes.core.manifest import Kind, Manifest

REPO = Path(__file__).resolve().parent.parent
LONGEST = ("test_slurm", "test_recipes_in_miniature", "test_readme", "test_chain", "test_parallel")
"""Files that take minutes: started first, none of them is left over for one worker at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files; tests of a file keep their order."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


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


def run_and_kill(*overrides: str, cwd: Path, metrics: Path, records: int) -> None:
    """Starts the launcher and kills it, once a stage has written so many records."""
    command = [sys.executable, str(REPO / "launch" / "run.py"), *overrides]
    launcher = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count("\n") < records:
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_until_none_works_in(cwd)


def wait_until_none_works_in(directory: Path) -> None:
    """A stage's processes, also those that its libraries start, must die with the launcher."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        processes = filter(str.isdigit, os.listdir("/proc"))
        found = [pid for pid in processes if _works_in(pid, directory)]
        if not found:
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {found}")


def _works_in(pid: str, directory: Path) -> bool:
    try:
        return Path("/proc", pid, "cwd").readlink() == directory
    except OSError:
        return False


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real English prose: the language reference that comes with Python."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    paragraphs = [p for topic in topics.values() for p in topic.split("\n\n") if len(p) > 200]
    path.write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs[:1200]))
    return path


def manifest_of(stage: str, kind: Kind, result: Any) -> Manifest:
    """A manifest that says nothing but what was measured."""
    return Manifest(
        stage=stage,
        kind=kind,
        fingerprint="f",
        config={},
        code="c",
        inputs={},
        files={},
        metrics=asdict(result),
        architecture=None,
        parameters=None,
        tokenizer_sha256="t",
        versions={},
        git_sha=None,
        started_at="2025-01-01T00:00:00+00:00",
        seconds=1.0,
        peak_rss_bytes=10**9,
    )
