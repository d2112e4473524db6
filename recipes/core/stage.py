"""Defines what every stage gets: settings, inputs, rank, deadline, and a file for metrics."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from omegaconf import MISSING

from recipes.core.constraints import Count, Duration, Environment, matching
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, Manifest
from recipes.core.metrics import METRICS, MetricsLog
from recipes.core.precision import Precision

if TYPE_CHECKING:
    from torch.distributed import Store

DEADLINE = "STAGE_DEADLINE"
"""Environment variable with the time, in seconds since 1970, when a stage must save and stop.

The Slurm executor sets it. A stopped stage is resumed later, so the result does not change.
"""
NEEDS_GPU = "STAGE_NEEDS_GPU"
"""Environment variable of stages that must run on a GPU, with the name of the hardware profile."""
SbatchOption = Annotated[str, matching(r"--\S[^\n]*", "an option of sbatch, such as --mem=0")]


@dataclass
class Resources:
    """Where a stage runs and on how many devices. Resources do not change the result."""

    nodes: Count = 1
    """Machines; more than one needs Slurm."""
    devices: Count = 1
    """Processes per node: one per GPU, or gloo ranks on a CPU."""
    env: Environment = field(default_factory=dict)
    """Environment variables of the stage, in addition to those of the cluster."""
    hang_timeout: Count | None = 7200
    """Seconds without progress after which a stage ends with an error that says where each rank
    hung. ``null``: no limit."""
    cpus_per_task: Count | None = None
    """CPUs on each node of the stage's Slurm job, for all processes together. ``null``:
    ``cluster.cpus_per_task``."""
    time: Duration | None = None
    """Time limit of one Slurm job, ``HH:MM:SS`` or ``D-HH:MM:SS``. ``null``: ``cluster.time``."""
    sbatch: list[SbatchOption] = field(default_factory=list)
    """Further options of the stage's Slurm job, such as ``--partition=cpu``. They override the same
    options in ``cluster.sbatch``."""

    @property
    def ranks(self) -> int:
        """Number of processes on all nodes together."""
        return self.nodes * self.devices


@dataclass
class StageConfig:
    """Settings that every stage has.

    Fields with the metadata ``resource`` do not change the result, so fingerprints omit them.
    """

    stage: str = MISSING
    """The module in ``recipes/stages`` that implements the stage."""
    # A resource: fingerprints contain the inputs' fingerprints, not the paths of their directories.
    inputs: dict[str, str] = field(default_factory=dict, metadata={"resource": True})
    """For each input, a stage of this run or the directory of another run's stage."""
    resources: Resources = field(default_factory=Resources, metadata={"resource": True})
    """Where the stage runs and on how many devices."""

    def __post_init__(self) -> None:
        """Sets ``name`` to the stage's type. Plan and worker replace it by the recipe's name."""
        self.name = self.stage  # not a dataclass field, because it is not a setting


@dataclass
class InferenceConfig(StageConfig):
    """Settings of stages that run a model on sequences of text."""

    seq_length: Count = 256
    """Tokens of a sequence."""
    precision: Precision = "32"
    """Precision of weights and computation, except output heads, which are always in float32:
    ``32``, or ``bf16-mixed``, which halves memory."""
    micro_batch_size: Count = field(default=4, metadata={"resource": True})
    """Sequences of a forward pass."""


@dataclass(frozen=True)
class Input:
    """A complete stage whose artifact another stage reads."""

    directory: Path
    manifest: Manifest

    @property
    def artifact(self) -> Path:
        """Directory of the input's files."""
        return self.directory / ARTIFACT


Inputs = Mapping[str, Input]  # by the input's name


class StoppedByDeadlineError(RecipeError):
    """A stage saved its work at the deadline. All ranks raise it at the same step."""


def rank() -> int:
    """Returns the global rank of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns the number of ranks of this job; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def shared_store() -> Store | None:
    """Returns torchrun's key-value store; ``None`` without torchrun. Needs no process group."""
    # A stage with one rank does not use torchrun, but may inherit torchrun's variable from the
    # process that starts the stage. A rehearsal sets WORLD_SIZE, but does not use torchrun.
    if world_size() == 1 or "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        return None
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://"))[0]
    return store


def deadline() -> float | None:
    """Returns the deadline in seconds since 1970; ``None`` if there is none.

    Raises ``RecipeError`` if the environment variable is not a number.
    """
    text = os.environ.get(DEADLINE)
    try:
        return float(text) if text else None
    except ValueError as error:
        raise RecipeError(
            f"invalid {DEADLINE}={text}: must be a number of seconds since 1970",
            "set it to such a number, or unset it",
        ) from error


def time_is_up() -> bool:
    """Returns whether the deadline has passed on this machine's clock."""
    limit = deadline()
    return limit is not None and time.time() >= limit


def require_time_left(next_step: str) -> None:
    """Raises ``StoppedByDeadlineError`` if the deadline has passed.

    The caller must have saved all steps before ``next_step``, which the error names.
    """
    if time_is_up():
        raise StoppedByDeadlineError(
            f"stopped at the deadline before {next_step}.", "run the same command to resume"
        )


def metrics_file(out: Path) -> Path:
    """Returns a stage's metrics file. ``out`` is ``work/artifact`` in the stage's directory."""
    return out.parent.parent / METRICS


def metrics_log(out: Path) -> MetricsLog:
    """Opens the ``metrics_file`` for writing. On ranks other than 0, the log writes nothing."""
    return MetricsLog(metrics_file(out) if rank() == 0 else None)
