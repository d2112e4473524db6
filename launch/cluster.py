"""Where stages run: what ``conf/cluster`` sets, and what an executor is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rich.console import Console

from launch.console import Follower
from launch.plan import Plan
from launch.planned import PlannedStage
from recipes.core.constraints import Environment, Variable

Follow = Callable[[PlannedStage], AbstractContextManager[Follower]]


@dataclass
class Cluster:
    """Settings that every executor has."""

    executor: str
    """The module in ``launch/executors`` that starts stages."""
    env: Environment = field(default_factory=dict)
    """Variables of every stage; ``resources.env`` adds to them."""
    pass_env: list[Variable] = field(default_factory=list)
    """Names of variables to pass on, for secrets: their values are never written anywhere."""


def layout_variables(stage: PlannedStage) -> dict[str, str]:
    """What the layout of a stage's model wants, unless the user says otherwise."""
    connections = stage.chain.hardware.cuda_device_max_connections
    if connections is None or stage.workload is None:
        return {}
    split = max(stage.workload.layout.tensor, stage.workload.layout.context) > 1
    return {"CUDA_DEVICE_MAX_CONNECTIONS": str(connections)} if split else {}


ClusterT = TypeVar("ClusterT", bound=Cluster)


@dataclass(frozen=True, kw_only=True)
class Executor(Generic[ClusterT]):
    """What starts stages: ``EXECUTOR`` of each module in ``launch/executors``."""

    config: type[ClusterT]
    prepare: Callable[[Plan, ClusterT], Plan]
    """Refuses what cannot run there, before anything is written, and sees what still runs."""
    write_scripts: Callable[[Plan, ClusterT], None]
    """Leaves in the run directory what starts each stage, to be read, edited, run by hand."""
    start: Callable[[Plan, ClusterT, Follow, Console], bool]
    """Starts the stages; true if they have all ended, and well."""
    follows: Callable[[ClusterT], bool] = lambda cluster: True
    """Whether the launcher sees what the stages record."""
