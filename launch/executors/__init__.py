"""Executors start stages. Each executor is a module with these names.

``CONFIG`` is the dataclass of its ``cluster`` settings.
``prepare(plan, cluster)`` returns the plan, or refuses it if it cannot run; it writes nothing. In
the returned plan, stages that already have a Slurm job have the action ``ADOPT``.
``problems(plan, cluster)`` yields broken rules about the scheduler's jobs. Rules can be skipped.
``write_scripts(plan, cluster)`` writes the scripts that the launcher or a user starts stages with.
``dry_run(plan, console)`` prints what the scheduler says about the scripts of a dry run.
``start(plan, cluster, follow, console)`` starts the stages; returns whether it waited for them.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from launch.cluster import Cluster
from launch.executors import docker, local, slurm
from launch.hydra_errors import as_typed
from recipes.core.errors import require_known

EXECUTORS: dict[str, Any] = {"local": local, "docker": docker, "slurm": slurm}


def executor_of(cfg: DictConfig) -> tuple[Any, Cluster]:
    """Returns the executor that ``cluster.executor`` names, and its typed settings."""
    name = str(cfg.executor)
    require_known(name, EXECUTORS, f"cluster.executor={name} is not known")
    return EXECUTORS[name], as_typed(EXECUTORS[name].CONFIG, cfg, "cluster")
