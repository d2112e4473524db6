"""Submits, shows and cancels jobs on a login node, where only the launcher is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.slurm_queue import active_jobs, read_jobs
from tests.slurm import probe
from tests.slurm.cluster import wait_for
from tests.slurm.conftest import Run
from tests.slurm.test_cluster_recipes import require_resources, states, whole_nodes
from tests.support.launcher import run_on_login_node

pytestmark = pytest.mark.timeout(600)


def test_a_login_node_submits_shows_and_cancels_jobs(
    launcher_python: Path, probe_settings: tuple[str, ...], tmp_path: Path
) -> None:
    """The jobs run with an interpreter that has all libraries, unlike the login node's.

    ``probe.HOLD`` makes distill, the last job, wait after step 1 until it is cancelled.
    """
    chain = Run(tmp_path / "run", ("recipe=llama3_1_8b_depth_2.5b", *probe_settings))

    def launch(*arguments: str) -> str:
        result = run_on_login_node(launcher_python, tmp_path, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    overrides = (
        "engine=null",
        "skip_rules=[disk]",
        "only=[plan,import_hf,prepare_data,score,prune,distill]",
        f"+cluster.env.{probe.HOLD}='1'",
    )
    launch(*chain.arguments(*overrides))
    jobs = read_jobs(chain.directory)
    assert {"plan", "import_hf", "distill"} <= jobs.keys()
    assert str(launcher_python) not in (chain.directory / "distill" / "job.sbatch").read_text()

    def status() -> str:
        return launch("status", f"run_dir={chain.directory}")

    # The status shows the progress of distill as "1/<number of steps>".
    wait_for(
        lambda: re.search(rf"distill +running +{jobs['distill'].id}.* 1/", status()), 300, pause=1
    )
    statuses = states(chain)
    assert {name for name in jobs if statuses[name] != "complete"} == {"distill"}
    require_resources(chain.directory / "distill", whole_nodes(1))

    output = launch("cancel", f"run_dir={chain.directory}")
    assert f"distill: job {jobs['distill'].id}" in output
    wait_for(lambda: not active_jobs(chain.directory), 120)
    assert re.search(r"distill +cancelled", status())
