"""Settings and environment variables that stages have on every cluster of ``conf/cluster``."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from launch.planned import PlannedStage
from launch.progress import Follower
from recipes.core.constraints import Environment, VariableName
from recipes.core.stage import NEEDS_GPU

Follow = Callable[[PlannedStage], AbstractContextManager[Follower]]
"""Returns a context manager that shows the progress of a stage while the stage runs."""


@dataclass
class Cluster:
    """Settings that every executor has."""

    executor: str
    """The module in ``launch/executors`` that starts stages."""
    env: Environment = field(default_factory=dict)
    """Environment variables of every stage; ``resources.env`` adds variables of one stage."""
    pass_env: list[VariableName] = field(default_factory=list)
    """Names of environment variables that stages get from the launcher. Use this for secrets: their
    values are written to no file."""

    @property
    def follow(self) -> bool:
        """Whether the launcher waits until the stages have ended, and shows their progress."""
        return True


def stage_variables(stage: PlannedStage, cluster: Cluster) -> dict[str, str]:
    """Returns the environment variables that a stage gets on every cluster."""
    hardware = stage.chain.hardware
    variables = {NEEDS_GPU: hardware.name} if stage.uses_gpu else {}
    connections = hardware.cuda_device_max_connections
    # A search trains its candidates with the settings in its field ``distill``.
    training_config = getattr(stage.config, "distill", stage.config)
    sizes = ("tensor_model_parallel_size", "context_parallel_size")
    is_split = max(getattr(training_config, size, 1) for size in sizes) > 1
    if is_split and connections is not None:
        # On GPUs before Blackwell, communication overlaps with computation only if kernels start in
        # the order of their calls. One connection ensures this order.
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = str(connections)
    variables |= cluster.env | stage.config.resources.env
    # PYTHONPATH starts with the code's snapshot, so the user's paths cannot replace it. A container
    # does not have the launcher's paths.
    launcher_paths = None if stage.image else os.environ.get("PYTHONPATH")
    paths = filter(None, [str(stage.code_dir), variables.get("PYTHONPATH"), launcher_paths])
    # Without PYTHONSAFEPATH, Python would first look in the working directory, often the checkout.
    return {**variables, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
