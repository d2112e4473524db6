"""Fixtures: a Slurm cluster, and a run of a tiny model on this cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.run_status import read_statuses
from launch.slurm_queue import active_jobs
from recipes.core.files import REPO_ROOT
from tests.slurm import probe
from tests.slurm.cluster import SlurmCluster, wait_for
from tests.support.in_process import run_in_process
from tests.support.installing import require_programs
from tests.support.launcher import CommandResult, run_recipe, write_program
from tests.support.models import EVEN, write_tiny_model
from tests.support.runs import copy_without, settings

SECRET = "a_token_that_no_file_may_hold"
"""Value of ``HF_TOKEN`` when the run ``tiny_chain`` is submitted."""
STEPS = 3
"""Training steps of ``tiny_chain``."""
CPUS = 64
"""``cluster.cpus_per_task``: CPUs per node of a job that does not take whole nodes."""
DISTILL = {
    "max_steps": STEPS,
    "warmup_steps": 1,
    "val_check_interval": STEPS,
    "checkpoint_interval": STEPS,
    "limit_val_batches": 1,
    # With few tokens, the measured loss of the tiny teacher could be near chance. Then the stage
    # would refuse the teacher.
    "global_batch_size": 16,
    "micro_batch_size": 8,
    "tensor_model_parallel_size": 2,
    "resources.nodes": 2,
    "resources.devices": 2,
}


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A Slurm controller and its simulated nodes."""
    require_programs("Slurm", "slurmctld", "slurmd", "munged", "sbatch")
    with SlurmCluster.running() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def probe_settings(
    slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ...]:
    """Overrides of ``cluster`` as in the commands of docs/first_day_on_slurm.md.

    ``cluster.python`` runs ``probe.py`` in place of Python.
    """
    folder = tmp_path_factory.mktemp("probe")
    # The script that replaces Python. It passes its own path in an environment variable.
    start = f'{probe.PROBE}="$0" exec {sys.executable} {probe.__file__} "$@"'
    python, image = write_program(folder / "python", start), folder / "image.sqsh"
    image.touch()
    # Without containers there is no image to check.
    images = f"cluster.images={{default: {image}, tensorrt_llm: {image}}}"
    return (
        "cluster=slurm",
        f"cluster.cpus_per_task={CPUS}",
        f"cluster.python={python}",
        images if slurm.has_containers else "skip_rules=[engine-image]",
        f"cluster.mounts=[{slurm.directory},{folder},{REPO_ROOT}/tests:ro]",
    )


@dataclass(frozen=True)
class Run:
    """A run: its directory, and the overrides with which it is submitted."""

    directory: Path
    overrides: tuple[str, ...]

    def submit(self, *extra: str) -> CommandResult:
        """Submits the run with ``extra`` overrides."""
        return run_in_process(*self.arguments(*extra), cwd=self.directory.parent)

    def arguments(self, *extra: str) -> tuple[str, ...]:
        """Returns the launcher's arguments that submit the run with ``extra`` overrides."""
        return (*self.overrides, f"run_dir={self.directory}", *extra)

    def command(self, name: str, *arguments: str) -> CommandResult:
        """Runs a command of the launcher about the run, such as ``status``."""
        cwd = self.directory.parent
        return run_in_process(name, f"run_dir={self.directory}", *arguments, cwd=cwd)

    def wait(self, seconds: float = 600) -> None:
        """Waits until no job of the run is active."""
        wait_for(lambda: not active_jobs(self.directory), seconds)

    def states(self) -> dict[str, str]:
        """Returns the status of each stage, such as ``complete``, by stage."""
        return {stage.name: stage.status for stage in read_statuses(self.directory)}

    def copy_without(self, directory: Path, *stages: str) -> Run:
        """Copies the run to ``directory / "copy"``, without some stages."""
        return Run(copy_without(self.directory, directory / "copy", *stages), self.overrides)


@pytest.fixture(scope="session")
def tiny_chain(
    slurm: SlurmCluster, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, CommandResult]:
    """A complete run of a tiny model, and the result of the launcher, which waited for the run.

    Distillation ran on two nodes with two ranks each. Stages ran in containers if this machine can
    start containers.
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
