"""Checks of the machines that stages run on: hardware profile, libraries, images and mounts."""

from __future__ import annotations

import math
import os
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
from recipes.planning.chain import TENSORRT_LLM, Chain, read_chain
from recipes.planning.hardware import Hardware
from recipes.planning.rules import Problem

HUB_FOLDERS = ("HF_HOME", "HF_HUB_CACHE")
"""Environment variables with folders of huggingface_hub."""


def chain_of(
    cfg: DictConfig, hf_path: str, configs: Mapping[str, StageConfig], run_dir: Path
) -> Chain:
    """Returns a run's stages and resources; refuses an unusable teacher or hardware profile."""
    chain = read_chain(hf_path, configs)
    # Resolves interpolations here, because ``as_typed`` converts the profile without its root.
    profile = OmegaConf.create(OmegaConf.to_container(cfg.hardware, resolve=True))
    hardware = as_typed(Hardware, profile, "hardware")  # type: ignore[arg-type]
    images = cfg.cluster.get("images") or {}
    if hardware.memory_bytes is None and cfg.cluster.executor == "slurm":
        hardware.memory_bytes = math.inf  # ``None`` would mean the login node's memory
    return replace(
        chain,
        hardware=hardware,
        run_dir=run_dir,
        runs_here=cfg.cluster.executor == "local",
        own_python=has_own_python(cfg.cluster),
        # YAML reads a name such as 1 as a number.
        images={name: image and str(image) for name, image in images.items()},
        time_limit=str(cfg.cluster.get("time", "")),
        margin_seconds=cfg.cluster.get("margin_seconds"),
        max_requeues=cfg.cluster.get("max_requeues"),
    )


def has_own_python(cluster: DictConfig) -> bool:
    """Returns whether stages run with the launcher's Python, not an image's or another Python."""
    has_image = bool((cluster.get("images") or {}).get("default"))
    return cluster.executor == "local" or not (has_image or cluster.get("python"))


def cluster_problems(
    cluster: DictConfig, chain: Chain, selected: Iterable[str]
) -> Iterator[Problem]:
    """Checks the cluster that runs the selected stages, as far as this machine can check it."""
    if cluster.executor == "slurm" and not chain.hardware.on_gpu:
        yield from _cpu_problems(cluster, chain.hardware)
    if chain.own_python and any(stage_of(chain.stages[name]).needs_torch for name in selected):
        yield from _stack_problems()
    shares_nodes = cluster.executor == "slurm" and not cluster.get("exclusive")
    if shares_nodes and cluster.get("cpus_per_task") is None:
        yield Problem(
            rules.CPUS_PER_TASK,
            "cluster.cpus_per_task is not set",
            "set it to the number of cores that a stage may use on a node",
        )
    yield from _image_problems(cluster, chain, selected)
    for mount in cluster.get("mounts") or []:
        path = Path(str(mount).removesuffix(":ro"))
        if not path.is_absolute() or not path.exists():
            yield Problem(
                rules.MOUNTS,
                f"cluster.mounts: {path} does not exist, or is not an absolute path",
                "give existing folders, such as /data or /data:ro",
            )
    # Executors with the setting ``mounts`` have containers, and mount these folders, too.
    mounted_folders = hub_folders() if "mounts" in cluster else {}
    for name, folder in mounted_folders.items():
        if not Path(folder).is_dir():
            yield Problem(
                rules.MOUNTS,
                f"{name}={folder} is not a folder on this machine",
                f"create the folder, or unset {name}",
            )


def hub_folders() -> dict[str, str]:
    """Returns the absolute paths of huggingface_hub's folders, by environment variable.

    If ``HF_HOME`` is not set, the result has its default folder, if that exists. The folder has the
    token of ``hf auth login``, even if ``HF_HUB_CACHE`` moves the models elsewhere.
    """
    cache_root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    default_home = Path(cache_root) / "huggingface"
    folders = {"HF_HOME": str(default_home)} if default_home.is_dir() else {}
    folders |= {name: os.environ[name] for name in HUB_FOLDERS if os.environ.get(name)}
    return {name: str(Path(folder).absolute()) for name, folder in folders.items()}


def _image_problems(
    cluster: DictConfig, chain: Chain, selected: Iterable[str]
) -> Iterator[Problem]:
    """Checks that images exist, and that stages that run TensorRT-LLM have an image."""
    configs = {name: chain.stages[name] for name in selected}
    images = {name: stage_of(config).image(config, chain) for name, config in configs.items()}
    or_no_engine = ", or set engine=null, which builds no engine"  # the end of a fix
    for name, image in chain.images.items():
        if image and image in images.values() and not _image_exists(image, cluster.executor):
            alternative = or_no_engine if name == TENSORRT_LLM else ""
            yield Problem(
                rules.IMAGE,
                f"cluster.images.{name}={image} does not exist",
                f"build or import it first; see Dockerfile{alternative}",
            )
    without_image = [
        name
        for name, config in configs.items()
        if not (chain.runs_here or images[name])
        and stage_of(config).needs_tensorrt_llm(config, chain)
    ]
    if without_image:
        yield Problem(
            rules.ENGINE_IMAGE,
            f"{', '.join(without_image)} cannot run: cluster.images.{TENSORRT_LLM} is not set",
            f"build the target engine of the Dockerfile and set it to that image{or_no_engine}",
        )


def _stack_problems() -> Iterator[Problem]:
    """Checks the versions of the libraries that the launcher's Python has."""
    wrong_pins = [pin for pin in pins() if not pin.is_satisfied]
    versions = [f"{pin.name} {pin.installed or 'missing'} ({pin.required})" for pin in wrong_pins]
    if versions:
        yield Problem(
            rules.STACK_VERSIONS,
            f"not the tested versions: {', '.join(versions)}",
            "run ./install.sh, and start with .venv/bin/python; or set cluster.images.default, or "
            "cluster.python to an interpreter that has them",
        )


def _cpu_problems(cluster: DictConfig, hardware: Hardware) -> Iterator[Problem]:
    """Warns if Slurm jobs for CPUs request GPUs, or train in float32 because of the default."""
    if cluster.get("gpus") is not None:
        yield Problem(
            rules.CLUSTER_HARDWARE,
            f"cluster=slurm requests GPUs, but hardware={hardware.name} is a CPU",
            "set the GPU, such as hardware=h100; for nodes without GPUs set cluster.gpus=null",
        )
    elif hardware.precision == "32":  # the default for unknown CPUs
        yield Problem(
            rules.CPU_PRECISION,
            f"hardware={hardware.name}, but the nodes' processors are not known here, so "
            "training is in float32",
            "set hardware.precision=bf16-mixed if all have bfloat16 instructions, or name a GPU",
        )


def mpi_problems(cluster: DictConfig, chain: Chain, selected: Iterable[str]) -> Iterator[Problem]:
    """Checks that ``cluster.mpi`` is not ``null`` for stages that start TensorRT-LLM on Slurm."""
    mpi = cluster.get("mpi", {})  # only Slurm's settings have it
    for name in selected:
        config = chain.stages[name]
        needs_mpi = stage_of(config).needs_tensorrt_llm(config, chain)
        is_null = config.stage in mpi and mpi[config.stage] is None
        if needs_mpi and is_null:
            yield Problem(
                rules.MPI,
                f"{name} starts TensorRT-LLM, but cluster.mpi.{config.stage} is null",
                "leave it out, or set it to the mpirun of the image",
            )


def _image_exists(image: str, executor: str) -> bool:
    """Returns whether an image exists; ``True`` if this machine cannot check it."""
    if image.startswith("/") or image.endswith(".sqsh"):
        return Path(image).is_file()
    if executor != "docker" or shutil.which("docker") is None:
        return True

    def succeeds(*arguments: str) -> bool:
        process = subprocess.run(["docker", *arguments], capture_output=True, check=False)
        return process.returncode == 0

    # ``docker version`` fails if the daemon does not answer: the image cannot be checked.
    return succeeds("image", "inspect", image) or not succeeds("version")
