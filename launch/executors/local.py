"""Runs stages on this machine, one after the other, each in its own torchrun."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from launch.console import Follower
from launch.plan import PlannedStage, stage_module
from recipes.errors import RecipeError
from recipes.fingerprint import REPO_ROOT
from recipes.manifest import MANIFEST, WORK, read_manifest
from recipes.stage import die_with_parent

POLL_SECONDS = 0.2


def check(stages: Iterable[PlannedStage]) -> None:
    """Raises ``RecipeError`` for a stage that one machine cannot run."""
    for stage in stages:
        if stage.config.resources.nodes != 1:
            raise RecipeError(
                f"stages.{stage.name}.resources.nodes={stage.config.resources.nodes}, but "
                "cluster=local is one machine.",
                "set it to 1",
            )
        # What only this kind of machine lacks must not come out after hours of training.
        getattr(stage_module(stage.config.stage), "require_here", lambda _: None)(stage.config)


def command(stage: PlannedStage) -> list[str]:
    """The stage's command line."""
    devices = stage.config.resources.devices
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        f"--nproc-per-node={devices}",
        *("-m", stage.module, "--config", str(stage.directory / "config.yaml")),
    ]


def environment(stage: PlannedStage, env: Mapping[str, str]) -> dict[str, str]:
    """Variables that the stage gets besides the caller's own."""
    devices = stage.config.resources.devices
    cores = max(1, (os.cpu_count() or 1) // devices)
    path = os.pathsep.join(filter(None, [str(REPO_ROOT), os.environ.get("PYTHONPATH")]))
    return {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(cores),
        **env,
        **stage.config.resources.env,
    }


def write_script(stage: PlannedStage, env: Mapping[str, str]) -> Path:
    """Writes ``run.sh``, which starts the stage by hand as the launcher would."""
    lines = ["#!/usr/bin/env bash", "set -euo pipefail"]
    lines += [f"export {k}={shlex.quote(v)}" for k, v in environment(stage, env).items()]
    lines += [f"cd {shlex.quote(os.getcwd())}", "exec " + shlex.join(command(stage))]
    path = stage.directory / "run.sh"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def run(stage: PlannedStage, env: Mapping[str, str], follower: Follower) -> None:
    """Runs one stage to its end.

    Raises:
        RecipeError: The stage ended without a new manifest of its fingerprint.
    """
    before = _manifest_time(stage)
    logs = stage.directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (stage.directory / WORK / "error.txt").unlink(missing_ok=True)
    log = logs / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(stage),
            env={**os.environ, **environment(stage, env)},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        try:
            while process.poll() is None:
                follower.update()
                time.sleep(POLL_SECONDS)
        except BaseException:
            process.terminate()
            process.wait(timeout=30)
            raise
    follower.update()
    # torchrun turns every failure into exit status 1, so only the manifest counts.
    # A forced stage still has the old one, with the same fingerprint, until it has succeeded.
    manifest = read_manifest(stage.directory)
    new = _manifest_time(stage) != before
    if manifest is None or manifest.fingerprint != stage.fingerprint or not new:
        raise RecipeError(
            f"stage {stage.name} failed: {_reason(stage.directory, log)}\n  log: {log}"
        )


def _manifest_time(stage: PlannedStage) -> int | None:
    path = stage.directory / MANIFEST
    return path.stat().st_mtime_ns if path.exists() else None


def _reason(directory: Path, log: Path) -> str:
    error = directory / WORK / "error.txt"
    if error.exists():
        return error.read_text(encoding="utf-8")
    tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
    return "it ended without a message; the log's last lines are\n    " + "\n    ".join(tail)
