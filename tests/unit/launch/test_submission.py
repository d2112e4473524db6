"""Resources that a Slurm job requests, and environment variables that a job inherits."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launch.executors import slurm
from tests.support.launcher import write_program
from tests.unit.conftest import stage_named

if TYPE_CHECKING:
    from tests.unit.conftest import MakePlan

SLURM = ("cluster=slurm", "hardware=h100", "cluster.images.tensorrt_llm=engine:1")


@pytest.fixture
def without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets large recipes be planned from the bundled configs."""
    monkeypatch.setattr("recipes.planning.chain.is_config_available", lambda _: False)


@pytest.mark.usefixtures("without_hub")
def test_a_search_gets_the_devices_of_its_training_runs(plan: MakePlan) -> None:
    search = plan(*SLURM, recipe="recipe=qwen3_8b_search")
    cluster = slurm.SlurmConfig(cpus_per_task=64)
    text = slurm.job_script(stage_named(search, "successive_halving"), cluster)
    for line in ("--gpus-per-node=8\n", "--exclusive\n", "CPUS_ON_NODE / 8 :"):
        assert line in text
    assert "--nproc-per-node=1 " in text, "its training runs start their own ranks"
    assert "cpus-per-task" not in text, "a job on a whole node uses all its CPUs"
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1\n" in text


@pytest.mark.usefixtures("without_hub")
def test_sbatch_and_srun_request_the_same_cpus(plan: MakePlan) -> None:
    large = plan(*SLURM, recipe="recipe=qwen3_8b_depth")
    cluster = slurm.SlurmConfig(cpus_per_task=64)
    for name, cpus in (("prepare_data", "16"), ("prune", "64")):
        text = slurm.job_script(stage_named(large, name), cluster)
        assert re.findall(r"--cpus-per-task=(\d+)", text) == [cpus, cpus]


def test_submission_ignores_variables_of_an_allocation(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(*SLURM)
    for stage in planned.stages:
        stage.directory.mkdir(parents=True, exist_ok=True)
    slurm.write_scripts(planned, slurm.SlurmConfig(partition="batch"))
    job_environment = tmp_path / "job_environment"
    for program, body in (("sbatch", f"env >>{job_environment}; echo 7"), ("squeue", "true")):
        write_program(tmp_path / "bin" / program, body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    allocation = ("SLURM_NTASKS", "SLURM_CPU_BIND", "PMIX_RANK", "PMI_SIZE", "CUDA_VISIBLE_DEVICES")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    defaults = ("SBATCH_TIMELIMIT", "SBATCH_PARTITION", "SBATCH_ACCOUNT", "SLURM_CONF")
    for name in (*allocation, *ranks, *defaults):
        monkeypatch.setenv(name, "1")
    subprocess.run([planned.run_dir / "submit.sh"], check=True)
    names = re.findall(r"^\w+(?==)", job_environment.read_text(), re.M)
    # The scripts set a partition but no account, so the user's default account stays.
    assert {*allocation, *ranks, *defaults} & set(names) == {"SLURM_CONF", "SBATCH_ACCOUNT"}
