"""Fixtures: a Slurm cluster, and a run of a tiny model on this cluster."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.slurm_queue import active_jobs
from recipes.core.files import REPO_ROOT
from tests.slurm import probe
from tests.slurm.cluster import SlurmCluster, wait_for
from tests.support.in_process import run_in_process
from tests.support.installing import require_programs
from tests.support.launcher import CommandResult, run_recipe, write_program
from tests.support.models import EVEN, write_tiny_model
from tests.support.runs import settings

SECRET = "a_token_that_no_file_may_hold"
STEPS = 3
CPUS = 64
"""CPUs of a job that shares a node."""
DISTILL = {
    "max_steps": STEPS,
    "warmup_steps": 1,
    "val_check_interval": STEPS,
    "checkpoint_interval": STEPS,
    "limit_val_batches": 1,
    # On few tokens, the loss of the tiny teacher could be near chance, which the stage refuses.
    "global_batch_size": 16,
    "micro_batch_size": 8,
    "tensor_model_parallel_size": 2,
    "resources.nodes": 2,
    "resources.devices": 2,
}


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A controller and its nodes."""
    require_programs("Slurm", "slurmctld", "slurmd", "munged", "sbatch")
    with SlurmCluster.running() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def probe_settings(
    slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ...]:
    """The settings that the documents recommend, with ``probe.py`` as interpreter of the jobs."""
    folder = tmp_path_factory.mktemp("probe")
    start = f'{probe.PROBE}="$0" exec {sys.executable} {probe.__file__} "$@"'
    python, image = write_program(folder / "python", start), folder / "image.sqsh"
    image.touch()
    return (
        "cluster=slurm",
        f"cluster.cpus_per_task={CPUS}",
        f"cluster.python={python}",
        f"cluster.images={{default: {image}, tensorrt_llm: {image}}}"
        if slurm.has_containers
        else "skip_rules=[engine-image]",
        f"cluster.mounts=[{slurm.directory},{folder},{REPO_ROOT}/tests:ro]",
    )


@dataclass(frozen=True)
class Run:
    """A run directory, and the overrides with which it is submitted."""

    directory: Path
    overrides: tuple[str, ...]

    def submit(self, *more: str) -> CommandResult:
        """Submits the run, with ``more`` overrides."""
        return run_in_process(*self.arguments(*more), cwd=self.directory.parent)

    def arguments(self, *more: str) -> tuple[str, ...]:
        """Returns the launcher's arguments that submit the run."""
        return (*self.overrides, f"run_dir={self.directory}", *more)

    def command(self, name: str, *more: str) -> CommandResult:
        """Runs a command of the launcher about the run, such as ``status``."""
        return run_in_process(name, f"run_dir={self.directory}", *more, cwd=self.directory.parent)

    def wait(self, seconds: float = 600) -> None:
        """Waits until no job of the run is active."""
        wait_for(lambda: not active_jobs(self.directory), seconds)

    def copy_without(self, directory: Path, *stages: str) -> Run:
        """Copies the run without some stages. Files keep their times, so none is hashed again."""
        copy = directory / "copy"
        shutil.copytree(self.directory, copy)
        for stage in stages:
            shutil.rmtree(copy / stage)
        return Run(copy, self.overrides)


@pytest.fixture(scope="session")
def tiny_chain(
    slurm: SlurmCluster, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, CommandResult]:
    """A complete run, which distilled on two nodes with two ranks each, and the launcher's output.

    Stages ran in containers if this machine can start them.
    """
    folder = tmp_path_factory.mktemp("slurm")
    model = write_tiny_model(folder / "teacher", text_file, **EVEN)
    image = folder / "image.sqsh"
    image.touch()
    overrides = (
        "recipe=llama_depth_prune",
        "~stages.plan",
        "~stages.report.inputs.plan",
        "tasks=null",
        "engine=null",
        "tracker=tensorboard",
        "cluster=slurm",
        "skip_rules=[cluster-hardware]",  # the nodes request GPUs, but stages run on the CPU
        f"cluster.images.default={image if slurm.has_containers else 'null'}",
        f"cluster.python={sys.executable}",
        "cluster.time=00:20:00",
        "cluster.margin_seconds=30",
        "+cluster.env.OMP_NUM_THREADS='1'",
        "+cluster.env.GREETING='it is \"quoted\" $HOME'",
        f"model.hf_path={model}",
        f"data.sources=[{text_file}]",
        "data.heldout_sources=[]",
        "data.text_field=text",
        "data.seq_length=64",
        "stages.prune.target_num_layers=3",
        *settings("distill", **DISTILL),
        "stages.evaluate.num_sequences=4",
        "stages.evaluate.new_tokens=4",
    )
    run = Run(folder / "run", overrides)
    os.environ["HF_TOKEN"] = SECRET
    try:
        return run, run_recipe(*run.arguments("cluster.follow=true"), cwd=folder, timeout=1500)
    finally:
        del os.environ["HF_TOKEN"]
