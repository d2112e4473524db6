"""Which executor starts the stages, by ``cluster.executor``."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from launch.cluster import Cluster, Executor
from launch.executors import docker, local, slurm
from launch.hydra_errors import as_typed
from recipes.core.errors import RecipeError, did_you_mean

EXECUTORS: dict[str, Executor[Any]] = {
    "local": local.EXECUTOR,
    "docker": docker.EXECUTOR,
    "slurm": slurm.EXECUTOR,
}


def executor_of(cfg: DictConfig) -> tuple[Executor[Any], Cluster]:
    """Returns what starts stages, and its typed settings.

    Raises:
        RecipeError: There is no such executor, or a setting is wrong.
    """
    name = str(cfg.executor)
    if name not in EXECUTORS:
        raise RecipeError(
            f"cluster.executor={name} is not known.{did_you_mean(name, EXECUTORS)}",
            f"use one of: {', '.join(EXECUTORS)}",
        )
    executor = EXECUTORS[name]
    return executor, as_typed(executor.config, cfg, "cluster")
