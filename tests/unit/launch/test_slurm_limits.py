"""Jobs that request too little for their processes, or too much for their partition."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from launch.executors import slurm
from launch.executors.slurm_limits import NodeGroup, Partition, read_partitions
from tests.support.launcher import write_program

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import MakePlan

# Memory is in MB, as in Slurm's own output.
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
    "large": Partition(COMMON_FIELDS | {"PartitionName": "large", "MinNodes": "2"}, [DGX]),
    "small": Partition(COMMON_FIELDS | {"PartitionName": "small", "MaxMemPerNode": "1000"}, [DGX]),
    "per-gpu": Partition(  # by default 300 CPUs per GPU, more than the 224 of a node
        COMMON_FIELDS | {"PartitionName": "per-gpu", "DefMemPerGPU": "9000", "DefCpuPerGPU": "300"},
        [DGX],
    ),
}
"""Partitions of a fake cluster, each with another limit or default."""
FITTING_CPUS: dict[str, Any] = {"cpus_per_task": 64}  # enough for every job of the recipe
PER_GPU = {"partition": "per-gpu"}
Problems = Callable[..., str]
"""Type of the fixture ``problems``."""


def sbatch(option: str, **cluster: object) -> dict[str, object]:
    """Returns fields of ``SlurmConfig``, with one option of sbatch."""
    return {"sbatch": [option], **cluster}


@pytest.fixture
def problems(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> Problems:
    """Returns the problems of the jobs of a recipe for one node of 8 GPUs, each with its rule.

    The arguments are further overrides of the recipe, and fields of ``SlurmConfig``.
    """
    monkeypatch.setattr("recipes.planning.chain.is_config_available", lambda _: False)
    monkeypatch.setattr(slurm, "read_partitions", lambda: PARTITIONS)
    options = ("cluster=slurm", "cluster.images.tensorrt_llm=engine:1", "hardware=h100")

    def problems_of_jobs(*overrides: str, **cluster: Any) -> str:
        planned = plan(*options, *overrides, recipe="recipe=qwen3_8b_depth_2.5b")
        config = slurm.SlurmConfig(**FITTING_CPUS | cluster)
        return "\n".join(map(str, slurm.problems(planned, config)))

    return problems_of_jobs


def test_jobs_that_fit_have_no_problem(problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems() == ""
    assert problems(partition="short,batch") == "", (
        "of several partitions, Slurm uses one that fits"
    )
    # The variable replaces Slurm's default partition, but not ``cluster.partition``.
    monkeypatch.setenv("SBATCH_PARTITION", "down")
    assert problems(partition="batch") == ""
    assert "partition down is DOWN" in problems()


@pytest.mark.parametrize(
    ("rule", "cluster", "message"),
    [
        ("job", sbatch("--nodes=2"), "report: the option --nodes=2 of sbatch would override"),
        ("job", sbatch("--time 9"), "would override resources.time"),
        ("job", sbatch("--job-name=team"), "would override the launcher's job-name"),
        ("job", sbatch("--dep=singleton"), "would override the launcher's dependency"),
        ("job", sbatch("--signal=USR1@120"), "--signal=USR1@120 of sbatch would kill"),
        ("job", sbatch("--cluster=east"), "--cluster=east of sbatch is unknown"),
        ("job", sbatch("--gres=gpu:h100", gpus=None), "requests 1 GPUs per node"),
        ("job", sbatch("--gres=gpu:h100:4", gpus=None), "4 GPUs per node, but uses 8"),
        ("job", sbatch("--gres=gpu:4(S:0),tmp:8", gpus=None), "4 GPUs per node, but uses 8"),
        ("job", sbatch("--gres=gpu:4"), "4 GPUs per node, but uses 8"),
        ("job", sbatch("--gpus-per-n=4"), "4 GPUs per node, but uses 8"),
        ("job-memory", {"cpus_per_task": 1}, "evaluate_served, measure_speed: the job gets 9 GB"),
        ("job-memory", sbatch("--mem=20G"), "import_hf, export_teacher: the job gets 20 GB"),
        ("job-memory", sbatch("--mem=9g"), "the job gets 9 GB of memory"),
        ("job-memory", sbatch("--mem=9GB"), "the job gets 9 GB of memory"),
        ("job-memory", sbatch("--mem-per-gpu=9G"), "the job gets 9 GB of memory"),
        ("job-memory", sbatch("--mem=200G"), "distill: the job gets 200 GB"),
        # 8 ranks each load 8.2 B parameters twice in bfloat16: 8 × 8.2e9 × 4 bytes = 262e9 bytes.
        # Slurm counts a GB as 1024³ bytes, so this is 244 GB.
        ("job-memory", sbatch("--mem=240G"), "loading the model on 8 ranks takes 244 GB"),
        # A job with one GPU gets the 9000 MB of DefMemPerGPU.
        ("job-memory", PER_GPU, "evaluate_served, measure_speed: the job gets 9"),
        # Without cpus_per_task, the partition's 300 CPUs per GPU count, and no node has them.
        ("partition", {**PER_GPU, "cpus_per_task": None}, "per-gpu allows 0"),
        ("partition", {"partition": "bach"}, "no partition bach. Did you mean 'batch'?"),
        ("partition", {"partition": "down"}, "partition down is DOWN"),
        ("partition", {"partition": "short"}, "4.0 hours; partition short allows 00:30:00"),
        ("partition", {"partition": "short"}, "1 GPU, 64 CPUs; partition short allows 0"),
        ("partition", {"partition": "large"}, "1 node; partition large requires at least 2"),
        ("partition", sbatch("--mem=2G", partition="small"), "small allows 0 such"),
        ("partition", sbatch("--mem=3T"), "3072 GB of memory; partition batch"),
    ],
)
def test_problems_of_jobs_are_reported(
    problems: Problems, rule: str, cluster: dict[str, object], message: str
) -> None:
    text = problems(**cluster)
    assert message in text
    assert f"[{rule}]" in text


@pytest.mark.parametrize(
    ("rule", "override", "message"),
    [
        ("job", "stages.prepare_data.resources.cpus_per_task=8", "starts 16 processes"),
        ("partition", "stages.distill.resources.nodes=8", "distill: the job requests 8 nodes"),
        ("partition", "stages.distill.resources.devices=16", "1 node with 16 GPUs"),
    ],
)
def test_problems_of_stages_are_reported(
    problems: Problems, rule: str, override: str, message: str
) -> None:
    text = problems(override)
    assert message in text
    assert f"[{rule}]" in text


def test_options_that_request_devices_or_cpus_in_another_way_are_refused(
    problems: Problems,
) -> None:
    names = ("gpus", "gpus-per-task", "gpus-per-socket", "tres-per-task", "tasks-per-node")
    fields = {**dict.fromkeys(names, "devices"), "cpus-per-gpu": "cpus_per_task"}
    options = [f"--{name}=4" for name in fields]
    text = problems(gpus=None, sbatch=options)
    for name, field in fields.items():
        assert f"the option --{name}=4 of sbatch would override resources.{field}" in text


def test_requests_of_the_right_number_of_gpus_have_no_problem(problems: Problems) -> None:
    options = {
        "score": "--gres=gpu:8,tmp:10",
        "distill": "--gres=gpu:h100:8,nvme:1",
        "evaluate": "--gres=gres/gpu=a:4,gpu:b:4",
        "import_hf": "--gres=gpu",
        "prune": "--gpus-per-node=h100:1",
    }
    overrides = [f"stages.{name}.resources.sbatch=['{option}']" for name, option in options.items()]
    assert problems(*overrides, gpus=None) == ""


def test_partitions_are_read_from_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = "PartitionName=a State=UP JobDefaults=DefCpuPerGPU=4,DefMemPerGPU=1000 MaxNodes=2"
    # Columns of sinfo: partition, number of nodes, CPUs, memory in MB, generic resources.
    outputs = {
        "sinfo": r"a|2|224|2000000|gpu:h100:8(S:0,1),tmp:10\na|1|8|9000|(null)",
        "scontrol": rf"{fields}\nPartitionName=b DefMemPerNode=UNLIMITED JobDefaults=(null)",
    }
    config = r"DefMemPerCPU            = 2000\nDefMemPerNode           = UNLIMITED"
    for program, output in outputs.items():
        choose = f'[ "$*" != "show config" ] || exec printf "{config}\\n"'
        write_program(tmp_path / program, f"{choose}\nprintf '{output}\\n'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    partitions = read_partitions()
    assert list(partitions) == ["a", "b"]
    gpu_nodes = NodeGroup(count=2, cpus=224, memory_mb=2_000_000, gpus=8)
    cpu_node = NodeGroup(count=1, cpus=8, memory_mb=9000, gpus=0)
    assert partitions["a"].groups == [gpu_nodes, cpu_node]
    limits = {"MaxNodes": 2, "DefCpuPerGPU": 4, "DefMemPerGPU": 1000}
    assert {field: partitions["a"].limit(field) for field in limits} == limits
    assert partitions["b"].limit("DefMemPerGPU") == float("inf"), "without a value: no limit"
    # A default of the whole cluster counts for partitions without a default of their own.
    per_cpu = [partitions[name].limit("DefMemPerCPU") for name in ("a", "b")]
    assert per_cpu == [float("inf"), 2000]
    write_program(tmp_path / "scontrol", "echo No partitions in the system")
    assert read_partitions() == {}
