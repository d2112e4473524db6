"""Executors start stages. Each executor is a module with these names.

``CONFIG`` is the dataclass of its ``cluster`` settings.
``prepare(plan, cluster)`` raises ``RecipeError`` if the cluster cannot run the plan. Otherwise it
returns the plan, in which stages that already have a Slurm job have the action ``ADOPT``.
``problems(plan, cluster)`` returns broken rules about the machine or jobs, which a user can skip.
``write_scripts(plan, cluster)`` writes the scripts with which the launcher or a user starts stages.
``dry_run(plan, console)`` prints the scheduler's answers for the scripts, without starting stages.
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
    """Returns the module of the executor that the settings ``cluster`` name, and typed settings."""
    name = str(cfg.executor)
    require_known(name, EXECUTORS, f"cluster.executor={name} is not known")
    return EXECUTORS[name], as_typed(EXECUTORS[name].CONFIG, cfg, "cluster")
