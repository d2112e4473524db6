"""The launcher with nothing but ``requirements/launcher.txt``, as on a login node."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.core.files import REPO_ROOT
from tests.support.launcher import LAUNCHER
from tests.support.reports import make_run

MOST_BYTES = 150e6
SLURM = ("cluster=slurm", "cluster.cpus_per_task=8", "skip_rules=[disk]")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of ``./install.sh launcher``."""
    venv = tmp_path_factory.mktemp("login_node") / "venv"
    env = {**os.environ, "VENV": str(venv), "PYTHON": sys.executable}
    done = subprocess.run(
        ["./install.sh", "launcher"],
        cwd=REPO_ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if "(from versions: none)" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    return venv / "bin" / "python"


def launch(python: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the launcher; nothing of this environment is on its path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, LAUNCHER, *words],
        cwd=cwd,
        env={**env, "COLUMNS": "160", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_is_small_and_has_no_torch(python: Path) -> None:
    venv = python.parent.parent
    assert sum(f.lstat().st_size for f in venv.rglob("*")) < MOST_BYTES
    assert not [
        path for name in ("torch", "numpy") for path in venv.glob(f"lib/*/site-packages/{name}")
    ]


def test_runs_are_planned_followed_and_compared(python: Path, tmp_path: Path) -> None:
    words = ("recipe=qwen3_8b_depth", "engine=null", "cluster.python=/opt/python", "dry_run=true")
    planned = launch(python, tmp_path, *words, *SLURM)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    run = tmp_path / "runs" / "qwen3_8b_depth"
    assert "/opt/python" in (run / "distill" / "job.sbatch").read_text()
    status = launch(python, tmp_path, "status", f"run_dir={run}")
    assert re.search(r"distill +not started", status.stdout), status.stdout + status.stderr
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", loss=3.6)
    compared = launch(python, tmp_path, "compare", str(one), str(other))
    assert compared.returncode == 0, compared.stderr
    assert "best: " in compared.stdout


def test_jobs_that_would_lack_libraries_are_refused(python: Path, tmp_path: Path) -> None:
    """Without an image or ``cluster.python`` they would start with the launcher's interpreter."""
    refused = launch(python, tmp_path, "recipe=qwen3_8b_depth", *SLURM, "dry_run=true")
    assert refused.returncode == 1
    assert "nemo_toolkit missing" in refused.stdout + refused.stderr
    assert not (tmp_path / "runs" / "qwen3_8b_depth" / "submit.sh").exists()
