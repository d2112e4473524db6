"""What a stage is given: its settings, its inputs, its rank, and where its records go."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import MISSING, OmegaConf

from recipes.core.constraints import Count, Duration, Environment, matching
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, MANIFEST, WORK, Manifest
from recipes.core.metrics import METRICS, MetricsLog

RUN_FILE = "run.yaml"
"""In a run directory: which recipe it is of, and the stages of that as it was last planned."""
REQUEST = "config.yaml"
"""In a stage's directory: what it is to be started with."""
BEGUN = "request.json"
"""In ``work/``: the request that the work belongs to; ``REQUEST`` may be a later one."""
FINGERPRINT = re.compile(r"^fingerprint: '?(\w+)'?$", re.MULTILINE)
"""Of a request; parsing all its YAML would take longer than all else, over a sweep."""


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


def asked(stage_dir: Path) -> str | None:
    """Fingerprint of the last request of a stage; ``None`` without one."""
    file = stage_dir / REQUEST
    found = FINGERPRINT.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else None


def planned_stages(run_dir: Path) -> set[str] | None:
    """Those of the recipe when it was last planned; ``None`` where that was not recorded."""
    file = run_dir / RUN_FILE
    stages = OmegaConf.select(OmegaConf.load(file), "stages") if file.is_file() else None
    return None if stages is None else set(stages)


def unfinished(stage_dir: Path) -> dict[str, Any] | None:
    """The request of the run that left unfinished work in ``stage_dir``; ``None`` without one.

    Raises:
        RecipeError: It cannot be read.
    """
    try:
        text = (stage_dir / WORK / BEGUN).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        request: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise RecipeError(
            f"{stage_dir / WORK / BEGUN} is damaged ({error}); nothing else says what was begun.",
            f"delete {stage_dir / WORK} to start over",
        ) from error
    return request


def left_behind(stage_dir: Path) -> Path | None:
    """Work whose result is there: the process was killed before it could delete it.

    That of a later start, which was forced and killed, is not.
    """
    work, manifest = stage_dir / WORK, stage_dir / MANIFEST
    if not work.exists() or not manifest.exists():
        return None
    begun = work / BEGUN
    later = begun.exists() and begun.stat().st_mtime_ns > manifest.stat().st_mtime_ns
    return None if later else work


def discard(work: Path) -> None:
    """Deletes ``work``, first what makes it resumable: killed here, half of it must not be."""
    (work / BEGUN).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
