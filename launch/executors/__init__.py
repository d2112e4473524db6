"""Executors start stages. Each executor is a module with these names.

``CONFIG`` is the dataclass of its ``cluster`` settings.
``prepare(plan, cluster)`` returns the plan, or raises ``RecipeError`` if the cluster cannot run it.
In the returned plan, stages that already have a Slurm job have the action ``ADOPT``. The function
writes nothing.
``problems(plan, cluster)`` returns the problems of the scheduler's jobs. Each problem names the
broken rule, which the user can skip.
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
    """Returns the module of the executor, and its typed settings.

    Args:
        cfg: The settings ``cluster``; ``cfg.executor`` is the executor's name.
    """
    name = str(cfg.executor)
    require_known(name, EXECUTORS, f"cluster.executor={name} is not known")
    return EXECUTORS[name], as_typed(EXECUTORS[name].CONFIG, cfg, "cluster")
