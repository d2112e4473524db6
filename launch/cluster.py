"""Where stages run: the settings that all clusters in ``conf/cluster`` have."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from launch.planned import PlannedStage
from launch.progress import Follower
from recipes.core.constraints import Environment, VariableName

Follow = Callable[[PlannedStage], AbstractContextManager[Follower]]
"""Shows the progress of a stage while it runs."""


@dataclass
class Cluster:
    """Settings that every executor has."""

    executor: str
    """The module in ``launch/executors`` that starts stages."""
    env: Environment = field(default_factory=dict)
    """Variables of every stage; ``resources.env`` adds to them."""
    pass_env: list[VariableName] = field(default_factory=list)
    """Names of variables to pass on, for secrets: their values are never written anywhere."""

    @property
    def follow(self) -> bool:
        """Whether the launcher waits until the stages have ended."""
        return True


def stage_variables(stage: PlannedStage, cluster: Cluster) -> dict[str, str]:
    """Variables that a stage gets on every cluster: for its code, its layout, and the user's."""
    connections = stage.chain.hardware.cuda_device_max_connections
    training = getattr(stage.config, "distill", stage.config)  # of a search: of its candidates
    sizes = ("tensor_model_parallel_size", "context_parallel_size")
    split = max(getattr(training, size, 1) for size in sizes) > 1
    ordered = split and connections is not None  # kernels must start in the order of their calls
    layout = {"CUDA_DEVICE_MAX_CONNECTIONS": str(connections)} if ordered else {}
    variables = {**layout, **cluster.env, **stage.config.resources.env}
    path = filter(None, [str(stage.code_dir), variables.get("PYTHONPATH")])
    # Python would otherwise look for modules in the working directory, often the checkout, first.
    return {**variables, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
