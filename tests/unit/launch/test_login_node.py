"""The launcher in an environment with only ``requirements/launcher.txt``, as on a login node.

``tests/slurm/test_cluster_recipes.py`` tests jobs and their status.
"""

from __future__ import annotations

import os
from pathlib import Path

from nemo_convert.hub import WEIGHTS_FILE
from tests.support.launcher import run_on_login_node
from tests.support.reports import make_run

MAX_BYTES = 150e6
"""Our limit for the installation. Torch alone is larger."""
SLURM = ("cluster=slurm", "cluster.cpus_per_task=8", "skip_rules=[disk]")
"""Overrides that set the CPUs of each job, and that need no large disk on this machine."""


def test_the_installation_is_small_and_has_no_torch(launcher_python: Path) -> None:
    venv = launcher_python.parent.parent
    assert sum(path.lstat().st_size for path in venv.rglob("*")) < MAX_BYTES
    assert not [
        path for name in ("torch", "numpy") for path in venv.glob(f"lib/*/site-packages/{name}")
    ]


def test_runs_are_compared(launcher_python: Path, tmp_path: Path) -> None:
    runs = [str(make_run(tmp_path / "one")), str(make_run(tmp_path / "other", loss=3.6))]
    compared = run_on_login_node(launcher_python, tmp_path, "compare", *runs)
    assert compared.returncode == 0, compared.stderr
    assert "2 runs compared in compare.html\nbest: " in compared.stdout


def test_a_run_is_planned_unless_its_weights_file_is_truncated(
    launcher_python: Path, hf_folder: Path, tmp_path: Path
) -> None:
    recipe = ("recipe=llama_depth_prune", "engine=null", f"model.hf_path={hf_folder}")
    # The interpreter is for the nodes. It need not exist on the login node.
    cluster = (*SLURM, "cluster.python=/opt/python", "cluster.gpus=null")
    arguments = (*recipe, *cluster, "dry_run=true")
    planned = run_on_login_node(launcher_python, tmp_path, *arguments)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    script = tmp_path / "runs" / "llama_depth_prune" / "distill" / "job.sbatch"
    assert "/opt/python" in script.read_text()
    weights = hf_folder / WEIGHTS_FILE
    os.truncate(weights, weights.stat().st_size - 1)
    refused = run_on_login_node(launcher_python, tmp_path, *arguments)
    assert refused.returncode == 1
    assert f"{weights} is damaged: it has" in refused.stdout + refused.stderr


def test_jobs_that_would_lack_libraries_are_refused(launcher_python: Path, tmp_path: Path) -> None:
    """Without an image or ``cluster.python``, jobs would use the launcher's interpreter.

    Here this interpreter has no NeMo.
    """
    refused = run_on_login_node(
        launcher_python, tmp_path, "recipe=qwen3_8b_depth", *SLURM, "dry_run=true"
    )
    assert refused.returncode == 1
    assert "nemo_toolkit missing" in refused.stdout + refused.stderr
    assert not (tmp_path / "runs" / "qwen3_8b_depth" / "submit.sh").exists()


def test_doctor_checks_only_what_the_launcher_needs(launcher_python: Path, tmp_path: Path) -> None:
    shown = run_on_login_node(launcher_python, tmp_path, "doctor")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "only the launcher" in shown.stdout
    assert "./install.sh installs" in shown.stdout
    assert "omegaconf" in shown.stdout
    assert "sbatch" in shown.stdout
    for stage_library in ("nemo_toolkit", "openvino", "torch", "tensorrt_llm"):
        assert stage_library not in shown.stdout
