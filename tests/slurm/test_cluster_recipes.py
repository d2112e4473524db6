"""Checks the resources of every rank in the jobs of each recipe, on simulated DGX nodes.

The launcher submits each recipe as users do. ``probe.py`` replaces the Python of the jobs: it
records the environment of each rank instead of running stages.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from launch.executors.slurm_limits import NodeGroup, read_partitions
from launch.schema import CONF
from launch.slurm_queue import active_jobs, read_jobs
from tests.slurm import probe
from tests.slurm.cluster import SlurmCluster, run, wait_for
from tests.slurm.conftest import CPUS, Run
from tests.support.launcher import run_on_login_node

pytestmark = pytest.mark.timeout(1200)
NODES = {
    "llama3_1_8b_depth": 32,
    "llama3_1_8b_width": 32,
    "mistral_nemo_12b_width": 32,
    "qwen3_8b_depth": 96,
    "qwen3_8b_nas": 96,
    **dict.fromkeys(("llama3_1_8b_depth_2.5b", "llama3_1_8b_width_2.5b"), 1),
    **dict.fromkeys(("mistral_nemo_12b_width_2.5b", "qwen3_8b_depth_2.5b", "qwen3_8b_nas_2.5b"), 1),
}
"""For each large recipe, the number of nodes of its distillation, which has 8 ranks per node."""
SMALL = ("llama_depth_prune", "llama_width_prune", "llama_search", "shrink")
"""Recipes for a small model: each stage is one rank."""
SEARCH = "qwen3_8b_search"
"""The only recipe of a search for a large model."""
HAS_MPI = shutil.which("mpirun") is not None
ENGINE_RECIPE = "llama3_1_8b_depth"
"""The only large recipe whose engine stages run in these tests. They start programs with mpirun."""
WHOLE_NODE_STAGES = ("score", "evaluate", "evaluate_tasks")
"""Stages besides ``distill`` that take one whole node, with a rank for each GPU."""
ENGINE_STAGES = {"build_engine", "build_teacher_engine", "measure_speed", "evaluate_served"}
STAGES_WITHOUT_GPU = {"plan", "prepare_data", "report", "enumerate_shapes"}
NODE_CPUS, NODE_GPUS, NODE_MEMORY_MB = 224, 8, 2_000_000
"""Resources of a node of ``SlurmCluster``."""
DATA_CPUS = 16
"""CPUs of ``prepare_data`` in large recipes."""
MEMORY_PER_CPU_MB = 8900
"""``DefMemPerCPU`` of ``SlurmCluster``: the memory of a job that does not take whole nodes."""


@dataclass(frozen=True)
class NodeResources:
    """Number of nodes of a job, and its resources on each node."""

    nodes: int
    ranks: int
    cpus: int
    gpus: int
    memory_mb: int
    threads: int | None = None
    """Threads per rank; by default the CPUs divided by the ranks."""


def whole_nodes(nodes: int, ranks: int = NODE_GPUS) -> NodeResources:
    """Returns the resources of a job on whole nodes, with ``ranks`` ranks and GPUs on each."""
    return NodeResources(nodes, ranks, NODE_CPUS, ranks, NODE_MEMORY_MB)


def one_rank(stage: str, data_cpus: int = DATA_CPUS) -> NodeResources:
    """Returns the resources of a stage of one rank; ``prepare_data`` gets ``data_cpus`` CPUs."""
    cpus = data_cpus if stage == "prepare_data" else CPUS
    return NodeResources(1, 1, cpus, int(stage not in STAGES_WITHOUT_GPU), cpus * MEMORY_PER_CPU_MB)


@pytest.fixture(scope="module")
def chains(
    probe_settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """Maps the name of each recipe to its run. All jobs of the runs have ended."""
    folder = tmp_path_factory.mktemp("recipes")
    runs = {
        recipe: Run(folder / recipe, (f"recipe={recipe}", *probe_settings, *settings_of(recipe)))
        for recipe in (*NODES, SEARCH, *SMALL)
    }
    for chain in runs.values():
        submit(chain)
    for chain in runs.values():
        chain.wait()
    return runs


def settings_of(recipe: str) -> tuple[str, ...]:
    """Returns a recipe's overrides in these tests."""
    if recipe in SMALL:
        return ("hardware=h100",)
    if recipe == SEARCH:  # with ``probe.TORCH``, the real torchrun starts ranks
        return (f"+stages.successive_halving.resources.env.{probe.TORCH}='1'",)
    return () if recipe == ENGINE_RECIPE and HAS_MPI else ("engine=null",)


def submit(chain: Run, *extra: str) -> None:
    """Submits a run with ``extra`` overrides, which must succeed."""
    result = chain.submit(*extra)
    assert result.code == 0, result.output


def records(stage_dir: Path) -> list[dict[str, Any]]:
    """Returns what ``probe.write_record`` wrote about each rank of a stage, sorted by rank."""
    files = (stage_dir / probe.RECORDS).glob("*.json")
    unsorted = (json.loads(file.read_text()) for file in files)
    return sorted(unsorted, key=lambda record: int(record.get("RANK", 0)))


def require_resources(stage_dir: Path, expected: NodeResources) -> None:
    """Requires that ranks got exactly the expected resources, and that they summed their ranks.

    The compared CPUs are those that Slurm allocated, because this machine has fewer CPUs than a
    simulated node.
    """
    ranks = records(stage_dir)
    world_size = expected.nodes * expected.ranks
    assert [int(r.get("RANK", 0)) for r in ranks] == list(range(world_size))
    assert {r["total"] for r in ranks} == {world_size * (world_size - 1) // 2}
    # How many ranks have the same node and local rank: each pair must occur once.
    rank_counts = Counter((r["SLURMD_NODENAME"], int(r.get("LOCAL_RANK", 0))) for r in ranks)
    assert set(rank_counts.values()) == {1}
    assert len({node for node, _ in rank_counts}) == expected.nodes
    assert {local_rank for _, local_rank in rank_counts} == set(range(expected.ranks))
    [_] = {(r["MASTER_ADDR"], r["MASTER_PORT"]) for r in ranks}  # equal on all ranks
    cores_by_node: dict[str, set[int]] = {}
    for record in ranks:
        cores_by_node.setdefault(record["SLURMD_NODENAME"], set()).update(record["affinity"])
    has_whole_nodes = expected.cpus == NODE_CPUS
    if has_whole_nodes:  # the ranks of a node may together use all cores of this machine
        assert list(cores_by_node.values()) == [os.sched_getaffinity(0)] * expected.nodes
    # A job on whole nodes has all memory, without a limit per CPU.
    memory_per_cpu = None if has_whole_nodes else str(MEMORY_PER_CPU_MB)
    assert {r.get("SLURM_MEM_PER_CPU") for r in ranks} == {memory_per_cpu}
    visible_gpus = ",".join(map(str, range(expected.gpus))) or None
    if expected.gpus == 1:  # the job gets any of the node's GPUs
        [visible_gpus] = {r["CUDA_VISIBLE_DEVICES"] for r in ranks}
        assert re.fullmatch(r"\d", visible_gpus)
    assert {r.get("CUDA_VISIBLE_DEVICES") for r in ranks} == {visible_gpus}
    assert {int(r["SLURM_CPUS_ON_NODE"]) for r in ranks} == {expected.cpus}
    assert {int(r["OMP_NUM_THREADS"]) for r in ranks} == {
        expected.threads or expected.cpus // expected.ranks
    }
    # Each node has its own folder of compiled extensions. A job on one node may leave the variable
    # unset; then the only value is None.
    assert len({r.get("TORCH_EXTENSIONS_DIR") for r in ranks}) == expected.nodes
    assert {r["LOCAL_WORLD_SIZE"] for r in ranks if world_size > 1} <= {str(expected.ranks)}
    step = ranks[0]["step"]  # contains "TRES=cpu=CPUS,mem=MEMORY", in M or G
    [(cpus, memory, unit)] = re.findall(r"TRES=cpu=(\d+),mem=([\d.]+)([MG])", step)
    assert int(cpus) == expected.nodes * expected.cpus
    megabytes = float(memory) * (1024 if unit == "G" else 1)
    assert megabytes == pytest.approx(expected.nodes * expected.memory_mb, rel=1e-3)


def test_every_recipe_for_a_cluster_is_listed() -> None:
    recipes = {file.stem for file in (CONF / "recipe").glob("*.yaml")}
    assert recipes == {*NODES, SEARCH, *SMALL}


@pytest.mark.parametrize("recipe", [*NODES, SEARCH])
def test_ranks_get_the_planned_resources(chains: dict[str, Run], recipe: str) -> None:
    chain = chains[recipe]
    statuses = chain.states()
    assert set(statuses.values()) == {"complete"}, statuses
    expected = dict.fromkeys(WHOLE_NODE_STAGES, whole_nodes(1))
    expected["distill"] = whole_nodes(NODES.get(recipe, 1))
    # A search has one rank, which starts training runs of 8 ranks. OMP_NUM_THREADS is set for the
    # training: 224 CPUs / 8 ranks = 28.
    expected["successive_halving"] = replace(whole_nodes(1), ranks=1, threads=28)
    for stage in statuses.keys() - ENGINE_STAGES:
        require_resources(chain.directory / stage, expected.get(stage) or one_rank(stage))


@pytest.mark.parametrize("recipe", SMALL)
def test_stages_of_a_small_recipe_are_one_rank(chains: dict[str, Run], recipe: str) -> None:
    statuses = chains[recipe].states()
    assert set(statuses.values()) == {"complete"}, statuses
    for stage in statuses:
        expected = one_rank(stage, data_cpus=CPUS)
        if stage in ENGINE_STAGES:  # OpenVINO runs on the CPU
            expected = replace(expected, gpus=0)
        require_resources(chains[recipe].directory / stage, expected)


def test_training_runs_of_a_search_get_all_devices(chains: dict[str, Run]) -> None:
    require_resources(
        chains[SEARCH].directory / "successive_halving" / probe.TRAINING, whole_nodes(1)
    )


@pytest.mark.skipif(not HAS_MPI, reason="needs Open MPI and mpi4py (tests/install_slurm.sh)")
@pytest.mark.parametrize("stage", sorted(ENGINE_STAGES))
def test_engine_stage_spawns_processes_by_mpi(chains: dict[str, Run], stage: str) -> None:
    [record] = records(chains[ENGINE_RECIPE].directory / stage)
    # ``probe.py`` runs ``spawn.py`` twice. Each prints the ranks of its two processes.
    assert record["spawned"].splitlines() == ["[0, 1]"] * 2
    assert re.fullmatch(r"\d", record["CUDA_VISIBLE_DEVICES"])
    assert int(record["OMP_NUM_THREADS"]) == CPUS
    assert not [name for name in record if name.startswith("SLURM_")]


def distill_again(original: Run, folder: Path, *overrides: str) -> Path:
    """Repeats a run's distillation with other settings; returns the stage's new directory."""
    chain = original.copy_without(folder, "distill")
    # With other settings, the plan may find too little text, or more hours than its requeues allow.
    submit(chain, "only=[distill]", "skip_rules=[tokens,requeues]", *overrides)
    chain.wait()
    assert chain.states()["distill"] == "complete"
    return chain.directory / "distill"


def test_torchrun_starts_ranks_on_several_nodes(chains: dict[str, Run], tmp_path: Path) -> None:
    real_torchrun = f"+stages.distill.resources.env.{probe.TORCH}='1'"
    layout = ("stages.distill.resources.nodes=2", "stages.distill.resources.devices=2")
    distill = distill_again(chains["llama3_1_8b_depth"], tmp_path, *layout, real_torchrun)
    require_resources(distill, whole_nodes(2, ranks=2))


@pytest.mark.parametrize("requests_gpus", [True, False])
def test_submission_from_an_allocation_gets_the_same_resources(
    requests_gpus: bool, chains: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in allocation().items():
        monkeypatch.setenv(name, value)
    # cluster.partition wins over SBATCH_PARTITION. With cluster.gpus=null, Slurm does not set
    # CUDA_VISIBLE_DEVICES, which ``require_resources`` expects for ``gpus=0``.
    settings = ("cluster.partition=batch", *(() if requests_gpus else ("cluster.gpus=null",)))
    distill = distill_again(chains["qwen3_8b_nas_2.5b"], tmp_path, *settings)
    require_resources(distill, whole_nodes(1) if requests_gpus else replace(whole_nodes(1), gpus=0))
    inherited = {"PMIX_RANK", "SBATCH_TIMELIMIT"} & records(distill)[0].keys()
    assert not inherited


def allocation() -> dict[str, str]:
    """Returns the variables that Slurm sets in an allocation, a user's defaults, and torchrun's."""
    size = ("-N2", "-n4", "-c2", "--mem=1000", "--gpus-per-node=2")
    text = run("salloc", *size, "srun", "--mpi=pmix", "-n1", "env", "-0")
    variables = dict(line.partition("=")[::2] for line in text.split("\0") if line)
    slurm = {
        name: value for name, value in variables.items() if re.match("SLURM|PMI|OMPI|CUDA", name)
    }
    assert {"SLURM_CPU_BIND", "PMIX_RANK", "CUDA_VISIBLE_DEVICES"} <= slurm.keys()
    user = {"SBATCH_TIMELIMIT": "1", "SBATCH_GPUS_PER_NODE": "1", "SBATCH_PARTITION": "elsewhere"}
    return {**slurm, **user, "RANK": "5", "WORLD_SIZE": "6"}


def test_ranks_that_share_a_node_get_a_fraction_of_it(
    chains: dict[str, Run], tmp_path: Path
) -> None:
    settings = (
        "cluster.exclusive=false",
        "cluster.gpus=gres",
        "stages.distill.resources.devices=4",
    )
    distill = distill_again(chains["llama3_1_8b_width_2.5b"], tmp_path, *settings)
    expected = NodeResources(1, ranks=4, cpus=CPUS, gpus=4, memory_mb=CPUS * MEMORY_PER_CPU_MB)
    require_resources(distill, expected)


def test_dry_run_asks_slurm(probe_settings: tuple[str, ...], tmp_path: Path) -> None:
    chain = Run(tmp_path / "run", ("recipe=qwen3_8b_depth", *probe_settings, "dry_run=true"))
    accepted = chain.submit()
    assert accepted.code == 0, accepted.output
    # Slurm says when the job could start, and on which CPUs and nodes: 96 * 224 = 21504 CPUs.
    assert re.search(r"distill +\d{4}-\S+ +21504 +n\[1-96\]", accepted.output), accepted.output
    refused = chain.submit("cluster.sbatch=['--reservation=none']")
    assert refused.code == 1
    assert "report: allocation failure: Requested reservation is invalid" in refused.output
    too_many = chain.submit("stages.distill.resources.nodes=192")
    assert too_many.code == 1
    assert "requests 192 nodes with 8 GPUs; partition batch allows 96" in too_many.output
    assert not (chain.directory / "jobs.txt").exists()


def test_limits_of_partitions_are_read(slurm: SlurmCluster) -> None:
    [(name, partition)] = read_partitions().items()
    assert name == "batch"
    assert partition.groups == [NodeGroup(96, NODE_CPUS, NODE_MEMORY_MB, NODE_GPUS)]
    assert partition.max_seconds == 86400  # a day
    assert partition.limit("DefMemPerCPU") == MEMORY_PER_CPU_MB


def test_a_login_node_submits_shows_and_cancels_jobs(
    launcher_python: Path, chains: dict[str, Run], tmp_path: Path
) -> None:
    """Only the launcher is installed on a login node. The jobs have an interpreter with all
    libraries. ``probe.HOLD`` makes distill wait after step 1 until it is cancelled.
    """
    chain = chains["llama3_1_8b_depth_2.5b"].copy_without(tmp_path, "prune", "distill")

    def launch(*arguments: str) -> str:
        result = run_on_login_node(launcher_python, tmp_path, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    overrides = ("only=[prune,distill]", "skip_rules=[disk,tokens,requeues]")
    launch(*chain.arguments(*overrides, f"+cluster.env.{probe.HOLD}='1'"))
    job = read_jobs(chain.directory)["distill"]
    assert str(launcher_python) not in (chain.directory / "distill" / "job.sbatch").read_text()

    def status() -> str:
        return launch("status", f"run_dir={chain.directory}")

    # The status shows the progress of distill as "1/<number of steps>".
    wait_for(lambda: re.search(rf"distill +running +{job.id}.* 1/", status()), 300, pause=1)
    assert chain.states()["prune"] == "complete"
    require_resources(chain.directory / "distill", whole_nodes(1))

    output = launch("cancel", f"run_dir={chain.directory}")
    assert f"distill: job {job.id}" in output
    wait_for(lambda: not active_jobs(chain.directory), 120)
    assert re.search(r"distill +cancelled", status())
