"""Which executor starts the stages, by ``cluster.executor``."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from launch.cluster import Cluster, Executor
from launch.executors import docker, local, slurm
from launch.hydra_errors import as_typed
from recipes.core.errors import require_known

EXECUTORS: dict[str, Executor[Any]] = {
    "local": local.EXECUTOR,
    "docker": docker.EXECUTOR,
    "slurm": slurm.EXECUTOR,
}


def executor_of(cfg: DictConfig) -> tuple[Executor[Any], Cluster]:
    """What starts stages, and its typed settings; refuses an executor that is not known."""
    name = str(cfg.executor)
    require_known(name, EXECUTORS, f"cluster.executor={name} is not known")
    executor = EXECUTORS[name]
    return executor, as_typed(executor.config, cfg, "cluster")
