"""The stage contract: how a stage is configured, started, and marked complete.

A stage is a module with a ``Config`` dataclass, the ``KIND`` it produces, the kinds of its
``INPUTS`` (one or a tuple of several), and ``run(cfg, inputs, out) -> Outcome``. It may have
``OPTIONAL_INPUTS``, which a recipe may leave out, ``check(cfg, chain)``, which finds in a second
what would fail after an hour, and ``progress(work)``, which says how far unfinished work has come
("step 50"), or ``None`` when there is nothing to lose. A training also has ``job(cfg, chain)``,
which is what a planner sees of it; and a stage whose result depends on others' settings has
``of_chain(cfg, chain)``, which puts them into its own. It is started as ``[torchrun] -m
recipes.<stage> --config <stage directory>/config.yaml``; ranks never compose. One that says
``LIGHT = True`` needs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf

from recipes.deadline import STOPPED, StoppedByClockError
from recipes.errors import RecipeError
from recipes.manifest import (
    ARTIFACT,
    WORK,
    Manifest,
    Outcome,
    check_artifact,
    publish,
    stamp_files,
    write_manifest,
    write_text_atomically,
)
from recipes.metrics import METRICS, MetricsLog

RECORDED_VERSIONS = (
    "nemo_toolkit",
    "megatron-core",
    "nvidia-modelopt",
    "transformers",
    "torch",
    "numpy",
    "openvino",
)
REQUEST = "request.json"
"""In ``work/``: the request that the work belongs to. ``config.yaml`` may be a later one's."""
PR_SET_PDEATHSIG = 1


@dataclass
class Resources:
    """Where and how large a stage runs; never changes its result."""

    nodes: int = 1
    devices: int = 1
    """Processes per node: one per GPU, or gloo ranks on a CPU."""
    env: dict[str, str] = field(default_factory=dict)
    time: str | None = None
    """Limit of one Slurm job, ``HH:MM:SS`` or ``D-HH:MM:SS``; by default the cluster's."""
    sbatch: list[str] = field(default_factory=list)
    """Options of its Slurm job after the cluster's, such as ``--partition=cpu``."""


@dataclass
class StageConfig:
    """Fields that every stage has."""

    stage: str = MISSING
    inputs: dict[str, str] = field(default_factory=dict)
    """Input name to a stage of this run, or to the directory of another run's stage."""
    resources: Resources = field(default_factory=Resources, metadata={"resource": True})


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
ConfigT = TypeVar("ConfigT", bound=StageConfig)
Run = Callable[[Any, Inputs, Path], Outcome]


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


def start_command(module: str, config: Path, devices: int, python: str) -> list[str]:
    """Starts a stage on one machine; several ranks with torchrun, which takes seconds to import.

    Args:
        module: The stage's module.
        config: Its ``config.yaml``.
        devices: Number of ranks.
        python: The interpreter.
    """
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", "-m"]
    return [python, "-m", *(several if devices > 1 else []), module, "--config", str(config)]


def stage_main(run: Run, config_class: type[ConfigT], kind: str) -> None:
    """Entry point of a stage's worker process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    request_file: Path = parser.parse_args().config
    stage_dir = request_file.parent
    die_with_parent()
    try:
        _run_stage(run, config_class, kind, request_file)
        _leave_together()
    except Exception as error:
        message = str(error) if isinstance(error, RecipeError) else traceback.format_exc()
        print(message, file=sys.stderr, flush=True)
        summary = message if isinstance(error, RecipeError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # on a full disk the launcher finds it in the log
            (stage_dir / WORK).mkdir(exist_ok=True)
            # When one rank fails, the others lose their connection, which is not the reason.
            if isinstance(error, RecipeError) or not (stage_dir / WORK / "error.txt").exists():
                write_text_atomically(stage_dir / WORK / "error.txt", summary)
            if isinstance(error, StoppedByClockError):
                write_text_atomically(stage_dir / WORK / STOPPED, summary)
                _leave_together()  # all ranks are here; the first to go would end the others
        # A failing rank must not wait in a collective for ranks that will never come.
        os._exit(1)


def _run_stage(run: Run, config_class: type[ConfigT], kind: str, request_file: Path) -> None:
    started, began = datetime.now(UTC), time.monotonic()
    stage_dir = request_file.parent
    request: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(request_file))  # type: ignore[assignment]
    merged = OmegaConf.merge(OmegaConf.structured(config_class), request["config"])
    cfg: ConfigT = OmegaConf.to_object(merged)  # type: ignore[assignment]
    out = prepare_work(stage_dir, request)
    inputs = {}
    for name, spec in request["inputs"].items():
        directory = Path(spec["directory"])
        # One rank reads every byte; on 64 nodes the others must not.
        inputs[name] = Input(directory, check_artifact(directory, spec["kind"], rehash=rank() == 0))
        if inputs[name].manifest.fingerprint != spec["fingerprint"]:
            raise RecipeError(f"{directory} changed after this stage was planned.", "run again")
    outcome = run(cfg, inputs, out)
    peak_rss = _finish_ranks()
    if rank() != 0:
        return
    manifest = Manifest(
        stage=cfg.stage,
        kind=kind,
        fingerprint=request["fingerprint"],
        config=request["config"],
        code=request["code"],
        inputs={name: spec["fingerprint"] for name, spec in request["inputs"].items()},
        files=stamp_files(out),
        metrics=outcome.metrics,
        architecture=outcome.architecture,
        parameters=outcome.parameters,
        tokenizer_sha256=outcome.tokenizer_sha256,
        versions=installed_versions(),
        git_sha=git_sha(),
        started_at=started.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - began, 3),
        peak_rss_bytes=peak_rss,
        input_content={name: item.manifest.content() for name, item in inputs.items()},
    )
    publish(stage_dir, out)
    write_manifest(stage_dir, manifest)
    _discard(stage_dir / WORK)


def unfinished(stage_dir: Path) -> dict[str, Any] | None:
    """The request of the run that left unfinished work in ``stage_dir``; ``None`` without one."""
    try:
        text = (stage_dir / WORK / REQUEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    request: dict[str, Any] = json.loads(text)
    return request


def _discard(work: Path) -> None:
    """Deletes ``work``, first what makes it resumable: killed here, half of it must not be."""
    (work / REQUEST).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def prepare_work(stage_dir: Path, request: Mapping[str, Any]) -> Path:
    """Makes ``work/`` ready and returns the directory to write the artifact to.

    Work left by a killed run of the same fingerprint is kept, so that training can resume; any
    other is deleted. Ranks other than 0 wait until rank 0 has done that.
    """
    work = stage_dir / WORK

    def is_ours() -> bool:
        found = unfinished(stage_dir)
        return found is not None and found["fingerprint"] == request["fingerprint"]

    if rank() == 0:
        if not is_ours():
            _discard(work)
            (stage_dir / METRICS).unlink(missing_ok=True)
        shutil.rmtree(work / ARTIFACT, ignore_errors=True)
        (work / ARTIFACT).mkdir(parents=True)
        write_text_atomically(work / REQUEST, json.dumps(request))
        (work / "error.txt").unlink(missing_ok=True)
        (work / STOPPED).unlink(missing_ok=True)
    else:
        _wait_for(is_ours, seconds=120)
    return work / ARTIFACT


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RecipeError(f"rank {rank()} waited {seconds:.0f} s for rank 0 in vain.")
        time.sleep(0.05)


def _finish_ranks() -> int:
    """Waits for all ranks and returns their peak resident memory in bytes, summed."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch = sys.modules.get("torch")
    if world_size() == 1 or torch is None or not torch.distributed.is_initialized():
        return own
    every: list[int] = [0] * world_size()
    torch.distributed.all_gather_object(every, own)
    return sum(every)


def _leave_together() -> None:
    """Ends all ranks at once, after rank 0 has written the manifest.

    A rank that leaves early with gloo's threads still running may abort, and torchrun would then
    kill rank 0 in the middle of its last work.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        if world_size() > 1:
            torch.distributed.barrier()
        # Groups that outlive their process group abort the interpreter at its exit with gloo.
        if megatron := sys.modules.get("megatron.core.parallel_state"):
            megatron.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that can change a result."""
    versions = {"python": sys.version.split()[0]}
    for name in RECORDED_VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def git_sha() -> str | None:
    """Commit of this checkout, marked when it has local changes."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, so that ``kill -9`` leaves no orphan.

    An orphaned rank would go on writing into the directory that the next run uses.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# Megatron's checkpoint writer starts processes that import the stage's module again; ``kill -9`` of
# a rank would leave them behind for good.
if "--multiprocessing-fork" in sys.orig_argv:
    die_with_parent()
