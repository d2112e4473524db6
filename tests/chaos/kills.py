"""Kills a launcher, or a process that it started, at a chosen moment of a stage."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.lock import LOCK
from recipes.core.manifest import ARTIFACT, WORK
from recipes.core.run_state import BEGUN
from recipes.distillation.training import (
    CHECKPOINTS,
    UNFINISHED,
    complete_checkpoints,
    steps_of_checkpoint,
)
from tests.chaos.chain import CHECKPOINT_INTERVAL, STEPS
from tests.support.launcher import LAUNCHER, wait_until_unused
from tests.support.runs import HEALING

VICTIMS = ("launcher", "stage", "server", "child")
"""Processes: the launcher, a stage, the fork server, and a process that a stage has started."""
MOMENTS = ("work", "launch", "publish", "save")
"""``work``: during a stage. ``launch``: before the first stage. ``publish``: while a result is
published. ``save``: while a checkpoint is saved."""
LAUNCH_SECONDS = 3  # a kill at ``launch`` comes within this time
HANG_SECONDS = 300  # after this time a launcher counts as hung


@dataclass(frozen=True)
class Kill:
    """Describes a kill before it is made."""

    stage: str
    victim: str = "launcher"
    moment: str = "work"
    fraction: float = 0.5
    """When to kill: after this fraction of the stage's uninterrupted time (``work``), or of
    ``LAUNCH_SECONDS`` (``launch``), or when this fraction of the steps is saved (``save``)."""

    @classmethod
    def draw(cls, stage: str, rng: random.Random) -> Kill:
        """Draws a random kill in a stage."""
        [victim] = rng.choices(VICTIMS, (4, 4, 1, 3))
        # Only ``distill`` saves checkpoints.
        [moment] = rng.choices(MOMENTS, (3, 1, 1, 5 * (stage == "distill")))
        return cls(stage, victim, moment, rng.random())


@dataclass(frozen=True)
class Killed:
    """A kill that was made: the stage that ran, the victim, and how the launcher ended."""

    stage: str
    victim: str
    exit_status: int
    output: str


@dataclass(frozen=True)
class RunCommand:
    """The command that starts a run, or resumes it after a kill."""

    overrides: list[str]
    run_dir: Path
    """The run directory. Its parent is the working directory of the run's processes only."""
    stage_seconds: Mapping[str, float]
    """Time that each stage takes without kills."""
    environment: Mapping[str, str]
    """Environment variables in addition to those of this process."""

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the launcher."""
        with (self.run_dir.parent / "output.txt").open("w") as output:
            return subprocess.Popen(
                [sys.executable, LAUNCHER, *self.overrides],
                cwd=self.run_dir.parent,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "COLUMNS": "160", **self.environment},
            )

    def finish(self) -> tuple[int, str]:
        """Runs the command to its end; returns its exit status and output."""
        return self.start().wait(timeout=600), self.output()

    def output(self) -> str:
        """Returns the output of the newest start."""
        return (self.run_dir.parent / "output.txt").read_text()

    def kill(self, kill: Kill) -> Killed | None:
        """Starts the command and kills the victim; ``None`` if the command ended earlier."""
        launcher = self.start()
        self._wait_for(kill, launcher)
        stage = self._stage_of(launcher) or "launcher"  # before the first stage
        if launcher.poll() is not None:
            return None
        try:
            processes = processes_of(launcher.pid)
            victim = kill.victim if processes[kill.victim] else "launcher"
            random.Random(kill.fraction).choice(processes[victim]).kill()  # reproducible
        except psutil.NoSuchProcess:  # the victim has just ended
            victim = "none"
        if victim != "launcher":
            # The launcher reports the failure and exits. But if this stage was already complete, it
            # starts the next stage, and is then killed, too.
            self._poll(launcher, lambda: self._stage_of(launcher) != stage)
            launcher.kill()
        exit_status = launcher.wait(timeout=HANG_SECONDS)
        wait_until_unused(self.run_dir.parent)
        return Killed(stage, victim, exit_status, self.output())

    def _stage_of(self, launcher: subprocess.Popen[bytes]) -> str | None:
        """Returns the stage that this launcher runs; ignores the lock of an earlier launcher."""
        try:
            lock = json.loads((self.run_dir / LOCK).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return lock["stage"] if lock["pid"] == launcher.pid else None

    def _wait_for(self, kill: Kill, launcher: subprocess.Popen[bytes]) -> None:
        """Waits for the moment of a kill, or until a later stage runs."""
        if kill.moment == "launch":
            time.sleep(LAUNCH_SECONDS * kill.fraction)
            return
        work = self.run_dir / kill.stage / WORK
        artifact, checkpoints = work / ARTIFACT, work / CHECKPOINTS
        old_start = _modified(work / BEGUN)  # a file that a stage writes when it starts
        stages = [None, *HEALING]  # ``None``: before the first stage

        def is_later() -> bool:
            return stages.index(self._stage_of(launcher)) > stages.index(kill.stage)

        def is_saving() -> bool:
            saved = max(map(steps_of_checkpoint, complete_checkpoints(checkpoints)), default=0)
            is_enough = saved >= kill.fraction * STEPS and any(checkpoints.glob(f"*{UNFINISHED}"))
            # If all saves were too quick to be seen, kills before the last one.
            return is_enough or saved >= STEPS - CHECKPOINT_INTERVAL

        self._poll(launcher, lambda: is_later() or _modified(work / BEGUN) not in (None, old_start))
        # A result is published by moving ``artifact`` out of ``work``.
        if kill.moment == "publish":
            self._poll(launcher, lambda: is_later() or artifact.exists(), pause=0)
            self._poll(launcher, lambda: not artifact.exists(), pause=0)
        elif kill.moment == "save":
            self._poll(launcher, lambda: is_later() or is_saving(), pause=0.001)
        elif not is_later():
            time.sleep(kill.fraction * self.stage_seconds[kill.stage])

    def _poll(
        self, launcher: subprocess.Popen[bytes], condition: Callable[[], bool], pause: float = 0.005
    ) -> None:
        """Waits until the condition holds or the launcher has ended."""
        deadline = time.monotonic() + HANG_SECONDS
        while launcher.poll() is None and not condition():
            assert time.monotonic() < deadline, "the launcher hangs"
            time.sleep(pause)


def _modified(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


def processes_of(launcher_pid: int) -> dict[str, list[psutil.Process]]:
    """Returns the processes of a run, by the names in ``VICTIMS``; several or none for a name."""
    launcher = psutil.Process(launcher_pid)
    started = launcher.children()
    servers = [process for process in started if "recipes.core.fork_server" in process.cmdline()]
    stages = [process for process in started if process not in servers]
    stages += [stage for server in servers for stage in server.children()]
    children = [child for stage in stages for child in stage.children(recursive=True)]
    return dict(zip(VICTIMS, ([launcher], stages, servers, children), strict=True))
