"""Where stages run: what ``conf/cluster`` sets, and the functions that every executor has."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from launch.console import Follower
from launch.plan import Plan, PlannedStage
from recipes.errors import RecipeError, did_you_mean

EXECUTORS = ("local", "docker", "slurm")
Follow = Callable[[PlannedStage], AbstractContextManager[Follower]]


@dataclass
class Cluster:
    """Settings that every executor has."""

    executor: str
    env: dict[str, str] = field(default_factory=dict)
    """Variables of every stage; ``resources.env`` adds to them."""
    pass_env: list[str] = field(default_factory=list)
    """Names of variables to pass on, for secrets: their values are never written anywhere."""


class Executor(Protocol):
    """The functions of a module in ``launch/executors``."""

    Config: type[Cluster]

    def prepare(self, plan: Plan, cluster: Any) -> Plan:
        """Refuses what cannot run there, before anything is written, and sees what still runs."""

    def write_scripts(self, plan: Plan, cluster: Any) -> None:
        """Leaves in the run directory what starts each stage, to be read, edited, run by hand."""

    def start(self, plan: Plan, cluster: Any, follow: Follow, console: Console) -> bool:
        """Starts the stages; true if they have all ended, and well."""


def executor_of(cfg: DictConfig) -> tuple[Executor, Cluster]:
    """Returns the module that starts stages, and its typed settings.

    Raises:
        RecipeError: There is no such executor, or a setting is wrong.
    """
    name = str(cfg.executor)
    if name not in EXECUTORS:
        raise RecipeError(
            f"cluster.executor={name} is not known.{did_you_mean(name, EXECUTORS)}",
            f"use one of: {', '.join(EXECUTORS)}",
        )
    executor = cast(Executor, importlib.import_module(f"launch.executors.{name}"))
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(executor.Config), cfg))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or getattr(error, "key", ""))
        near = did_you_mean(key, executor.Config.__dataclass_fields__)
        raise RecipeError(f"cluster.{key}: {str(error).splitlines()[0]}.{near}") from error
    return executor, cast(Cluster, typed)
