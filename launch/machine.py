"""What stages run on: the hardware profile, and libraries, images and mounts that must be there."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from launch.hydra_errors import as_typed
from launch.planned import stage_of
from recipes.core.stage import StageConfig
from recipes.core.versions import pins
from recipes.planning import rules
from recipes.planning.chain import Chain, read_chain
from recipes.planning.hardware import Hardware
from recipes.planning.problems import Problem

LOCAL, DOCKER, SLURM = "local", "docker", "slurm"


def chain_of(
    cfg: DictConfig, hf_path: str, configs: Mapping[str, StageConfig], run_dir: Path
) -> Chain:
    """The chain, and what it is to run on; refuses an unusable teacher or hardware profile."""
    chain = read_chain(hf_path, configs)
    # Resolved first: what is looked up of a processor depends on where the stages run.
    profile = OmegaConf.create(OmegaConf.to_container(cfg.hardware, resolve=True))
    hardware = as_typed(Hardware, profile, "hardware")  # type: ignore[arg-type]
    if hardware.memory_bytes is None and cfg.cluster.executor == SLURM:
        hardware.memory_bytes = math.inf  # a login node's says nothing of where the jobs run
    limit = str(cfg.cluster.get("time", ""))  # not checked yet
    return replace(
        chain,
        hardware=hardware,
        run_dir=run_dir,
        runs_here=cfg.cluster.executor == LOCAL,
        images=cfg.cluster.get("images") or {},
        time_limit=limit,
    )


def cluster_problems(cluster: DictConfig, hardware: Hardware) -> Iterator[Problem]:
    """Checks where the stages will run, as far as it can be seen from here."""
    if not hardware.on_gpu:
        yield from _cpu_problems(cluster, hardware)
    if cluster.executor == LOCAL:
        yield from _stack_problems()
    shared = cluster.executor == SLURM and not cluster.get("exclusive")
    if shared and cluster.get("cpus_per_task") is None:
        yield Problem(
            rules.CPUS_PER_TASK,
            "cluster.cpus_per_task is not set",
            "set it to the cores of a node that its processes may use",
        )
    for name, image in (cluster.get("images") or {}).items():
        if image is not None and not _is_there(str(image), str(cluster.executor)):
            yield Problem(
                rules.IMAGE,
                f"cluster.images.{name}={image} is not there",
                "build or import it first; see Dockerfile",
            )
    for mount in cluster.get("mounts") or []:
        path = Path(str(mount).removesuffix(":ro"))
        if not path.is_absolute() or not path.exists():
            yield Problem(
                rules.MOUNTS,
                f"cluster.mounts: {path} is not there, or not an absolute path",
                "give existing folders, such as /data or /data:ro",
            )


def _cpu_problems(cluster: DictConfig, hardware: Hardware) -> Iterator[Problem]:
    """Checks that a plan for a CPU is for jobs that run on CPUs, whose types are known."""
    if cluster.executor != LOCAL and cluster.get("gpus") is not None:
        yield Problem(
            rules.CLUSTER_HARDWARE,
            f"cluster={cluster.executor} requests GPUs, but hardware={hardware.name} is a CPU",
            "set the GPU, such as hardware=h100; for nodes without GPUs set cluster.gpus=null",
        )
    elif cluster.executor == SLURM and hardware.precision == "32":
        yield Problem(
            rules.CPU_PRECISION,
            f"hardware={hardware.name}, and the nodes' processors are not known here: training is "
            "in float32",
            "set hardware.precision=bf16-mixed if all have bfloat16 products, or name a GPU",
        )


def mpi_problems(cluster: DictConfig, chain: Chain, wanted: Iterable[str]) -> Iterator[Problem]:
    """Checks that stages which start TensorRT-LLM in Slurm's jobs are given MPI."""
    mpi = cluster.get("mpi", {}) if cluster.executor == SLURM else {}
    for name in wanted:
        config = chain.stages[name]
        given = mpi.get(config.stage, "")
        if given is None and stage_of(config).needs_gpu(config, chain):
            yield Problem(
                rules.MPI,
                f"{name} starts TensorRT-LLM, but cluster.mpi.{config.stage} is null",
                "set it to pmix, unless that is your site's MpiDefault",
            )


def _stack_problems() -> Iterator[Problem]:
    wrong = [pin for pin in pins() if not pin.holds]
    if wrong:
        listed = ", ".join(f"{p.name} {p.found or 'missing'} ({p.wanted})" for p in wrong)
        yield Problem(
            rules.STACK_VERSIONS,
            f"not the tested versions: {listed}",
            "./install.sh, and start with .venv/bin/python; or use cluster=docker",
        )


def _is_there(image: str, executor: str) -> bool:
    """Whether an image is a file that exists, or known to docker here; a registry is not asked."""
    if image.startswith("/") or image.endswith(".sqsh"):
        return Path(image).is_file()
    if executor != DOCKER or shutil.which("docker") is None:
        return True
    command = ["docker", "image", "inspect", "--format", "{{.Id}}", image]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
