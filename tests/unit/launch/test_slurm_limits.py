"""Jobs that request too little for their processes, or too much for their partition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from launch.executors import slurm
from launch.executors.slurm_limits import NodeGroup, Partition

if TYPE_CHECKING:
    from tests.unit.conftest import MakePlan

DGX = NodeGroup(count=4, cpus=224, memory_mb=2_000_000, gpus=8)
COMMON_FIELDS = {"Default": "NO", "State": "UP", "MaxTime": "1-00:00:00", "MaxNodes": "UNLIMITED"}
PARTITIONS = {
    "batch": Partition(
        COMMON_FIELDS | {"PartitionName": "batch", "Default": "YES", "DefMemPerCPU": "8900"}, [DGX]
    ),
    "short": Partition(
        COMMON_FIELDS | {"PartitionName": "short", "MaxTime": "00:30:00", "MaxCPUsPerNode": "32"},
        [DGX],
    ),
    "down": Partition(COMMON_FIELDS | {"PartitionName": "down", "State": "DOWN"}, [DGX]),
}
FITTING_CPUS = {"cpus_per_task": 64}  # enough for every job of the recipe


def problems_of_jobs(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch, *overrides: str, **cluster: object
) -> str:
    """Plans a recipe for one node; returns the problems of its jobs, each with its rule."""
    monkeypatch.setattr("recipes.planning.chain.is_config_available", lambda _: False)
    monkeypatch.setattr(slurm, "read_partitions", lambda: PARTITIONS)
    args = ("cluster=slurm", "cluster.images.tensorrt_llm=engine:1", "hardware=h100", *overrides)
    planned = plan(*args, recipe="recipe=qwen3_8b_depth_2.5b")
    return "\n".join(map(str, slurm.problems(planned, slurm.SlurmConfig(**FITTING_CPUS | cluster))))  # type: ignore[arg-type]


def test_jobs_that_fit_have_no_problem(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems_of_jobs(plan, monkeypatch) == ""
    assert problems_of_jobs(plan, monkeypatch, partition="short,batch") == "", (
        "Slurm uses a partition that fits"
    )
    monkeypatch.setenv("SBATCH_PARTITION", "down")
    assert problems_of_jobs(plan, monkeypatch, partition="batch") == ""
    assert "partition down is DOWN" in problems_of_jobs(plan, monkeypatch)


@pytest.mark.parametrize(
    ("overrides", "cluster", "message", "rule"),
    [
        (
            (),
            {"sbatch": ["--nodes=2"]},
            "report: the option --nodes=2 of sbatch would override",
            "job",
        ),
        ((), {"sbatch": ["--time 9"]}, "would override resources.time", "job"),
        ((), {"sbatch": ["--job-name=team"]}, "would override the launcher's job-name", "job"),
        (
            (),
            {"sbatch": ["--gres=gpu:h100:4"], "gpus": None},
            "4 GPUs per node, but uses 8",
            "job",
        ),
        (("stages.prepare_data.resources.cpus_per_task=8",), {}, "starts 16 processes", "job"),
        (
            (),
            {"cpus_per_task": 1},
            "build_engine, measure_speed: the job gets 9 GB",
            "job-memory",
        ),
        (
            (),
            {"sbatch": ["--mem=20G"]},
            "import_hf, export_teacher: the job gets 20 GB",
            "job-memory",
        ),
        ((), {"sbatch": ["--mem=9G"]}, "the job gets 9 GB of memory", "job-memory"),
        ((), {"sbatch": ["--mem=200G"]}, "distill: the job gets 200 GB", "job-memory"),
        ((), {"partition": "bach"}, "no partition bach. Did you mean 'batch'?", "partition"),
        ((), {"partition": "down"}, "partition down is DOWN", "partition"),
        ((), {"partition": "short"}, "4.0 hours; partition short allows 00:30:00", "partition"),
        ((), {"partition": "short"}, "1 GPU, 64 CPUs; partition short allows 0", "partition"),
        ((), {"sbatch": ["--mem=3T"]}, "3072 GB of memory; partition batch", "partition"),
        (
            ("stages.distill.resources.nodes=8",),
            {},
            "distill: the job requests 8 nodes",
            "partition",
        ),
        (("stages.distill.resources.devices=16",), {}, "1 node with 16 GPUs", "partition"),
    ],
)
def test_problems_of_jobs_are_reported(
    plan: MakePlan,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    cluster: dict[str, object],
    message: str,
    rule: str,
) -> None:
    text = problems_of_jobs(plan, monkeypatch, *overrides, **cluster)
    assert message in text
    assert f"[{rule}]" in text
