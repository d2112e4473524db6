"""What a stage is given: its settings, its inputs, its rank, and where its records go."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from omegaconf import MISSING

from recipes.core.constraints import Count, Duration, Environment, matching
from recipes.core.manifest import ARTIFACT, Manifest
from recipes.core.metrics import METRICS, MetricsLog

SbatchOption = Annotated[str, matching(r"--\S[^\n]*", "an option of sbatch, such as --mem=0")]


@dataclass
class Resources:
    """Where and how large a stage runs; never changes its result."""

    nodes: Count = 1
    """Machines; more than one needs Slurm."""
    devices: Count = 1
    """Processes per node: one per GPU, or gloo ranks on a CPU."""
    env: Environment = field(default_factory=dict)
    """Variables of its processes, besides the cluster's."""
    max_silence: Count | None = 7200
    """Seconds without a record of progress after which a stage is taken to hang: it ends, and says
    what each rank was doing. ``null`` for no limit."""
    time: Duration | None = None
    """Limit of one Slurm job, ``HH:MM:SS`` or ``D-HH:MM:SS``; by default the cluster's."""
    sbatch: list[SbatchOption] = field(default_factory=list)
    """Options of its Slurm job after the cluster's, such as ``--partition=cpu``."""

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.nodes * self.devices


@dataclass
class StageConfig:
    """Fields that every stage has."""

    stage: str = MISSING
    """The module in ``recipes/stages`` that does it."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Input name to a stage of this run, or to the directory of another run's stage."""
    resources: Resources = field(default_factory=Resources, metadata={"resource": True})
    """Where and how large it runs."""


@dataclass(frozen=True)
class Input:
    """One input as a stage sees it."""

    directory: Path
    manifest: Manifest

    @property
    def artifact(self) -> Path:
        """Directory of the input's files."""
        return self.directory / ARTIFACT


Inputs = Mapping[str, Input]


def rank() -> int:
    """Global rank of this process under torchrun; 0 outside it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks of this job; 1 outside torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def metrics_file(out: Path) -> Path:
    """Where the stage that writes its artifact to ``out`` keeps its metrics."""
    return out.parent.parent / METRICS


def metrics_log(out: Path) -> MetricsLog:
    """The stage's metrics file; silent on ranks other than 0."""
    return MetricsLog(metrics_file(out) if rank() == 0 else None)
