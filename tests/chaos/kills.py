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
from tests.support.runs import HEALING_STAGES

VICTIMS = ("launcher", "stage", "server", "child")
"""Types of processes that can be killed: the launcher, a stage, the fork server from which stages
are forked, and a process that a stage has started."""
MOMENTS = ("work", "launch", "publish", "save")
"""Moments of kills. ``work``: during a stage. ``launch``: shortly after the launcher's start.
``publish``: while a result is published. ``save``: while a checkpoint is saved."""
LAUNCH_SECONDS = 3
"""Largest time between the launcher's start and a kill at ``launch``."""
HANG_SECONDS = 300
"""Time after which a launcher counts as hung."""


@dataclass(frozen=True)
class Kill:
    """A planned kill."""

    stage: str
    victim: str = "launcher"
    """One of ``VICTIMS``."""
    moment: str = "work"
    """One of ``MOMENTS``."""
    fraction: float = 0.5
    """When to kill: after this fraction of the stage's uninterrupted time (``work``), or of
    ``LAUNCH_SECONDS`` (``launch``), or when this fraction of the steps is saved (``save``). Has no
    effect on ``publish``."""

    @classmethod
    def draw(cls, stage: str, rng: random.Random) -> Kill:
        """Draws a random kill in a stage."""
        [victim] = rng.choices(VICTIMS, weights=(4, 4, 1, 3))
        # Only ``distill`` saves checkpoints.
        save_weight = 5 if stage == "distill" else 0
        [moment] = rng.choices(MOMENTS, weights=(3, 1, 1, save_weight))
        return cls(stage, victim, moment, rng.random())


@dataclass(frozen=True)
class Killed:
    """A kill that was made."""

    stage: str
    """The stage that ran, or ``launcher`` before the first stage."""
    victim: str
    """One of ``VICTIMS``, or ``none`` if the process had just ended."""
    exit_status: int
    """Exit status of the launcher; -9 if it was killed."""
    output: str
    """Output of the launcher."""


@dataclass(frozen=True)
class RunCommand:
    """The command that starts a run, or resumes it after a kill."""

    overrides: list[str]
    run_dir: Path
    """The run directory. Its parent is the working directory of the run's processes only, because
    ``kill`` waits until no process has this working directory."""
    stage_seconds: Mapping[str, float]
    """Time that each stage takes without kills, by stage."""
    environment: Mapping[str, str]
    """Environment variables in addition to those of this process."""

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the launcher. Its output replaces that of the previous start."""
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
        """Returns the output of the last start."""
        return (self.run_dir.parent / "output.txt").read_text()

    def kill(self, kill: Kill) -> Killed | None:
        """Starts the command and kills a process of the type ``kill.victim``.

        If there is no such process, kills the launcher. When this method returns, no process of the
        run is left.

        Returns:
            The kill; ``None`` if the command ended before its moment.
        """
        launcher = self.start()
        self._wait_for(kill, launcher)
        stage = self._stage_of(launcher) or "launcher"  # before the first stage
        if launcher.poll() is not None:
            return None
        try:
            processes = processes_of(launcher.pid)
            victim = kill.victim if processes[kill.victim] else "launcher"
            # Seeded, so that the same ``kill`` chooses the same process again.
            random.Random(kill.fraction).choice(processes[victim]).kill()
        except psutil.NoSuchProcess:  # the victim has just ended
            victim = "none"
        if victim != "launcher":
            # The launcher reports the failure and exits. But if the stage was already complete, the
            # launcher starts the next stage. Then it is killed, too.
            self._poll(launcher, lambda: self._stage_of(launcher) != stage)
            launcher.kill()
        exit_status = launcher.wait(timeout=HANG_SECONDS)
        wait_until_unused(self.run_dir.parent)
        return Killed(stage, victim, exit_status, self.output())

    def _stage_of(self, launcher: subprocess.Popen[bytes]) -> str | None:
        """Returns the stage that this launcher runs; ``None`` before the first stage.

        An earlier launcher that was killed has left its lock file. It is ignored.
        """
        try:
            lock = json.loads((self.run_dir / LOCK).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return lock["stage"] if lock["pid"] == launcher.pid else None

    def _wait_for(self, kill: Kill, launcher: subprocess.Popen[bytes]) -> None:
        """Waits for the moment of a kill, or until a stage after ``kill.stage`` runs."""
        if kill.moment == "launch":
            time.sleep(LAUNCH_SECONDS * kill.fraction)
            return
        work = self.run_dir / kill.stage / WORK
        artifact, checkpoints = work / ARTIFACT, work / CHECKPOINTS
        # Each start of a stage writes BEGUN anew.
        previous_start = _modification_time(work / BEGUN)
        stages = [None, *HEALING_STAGES]  # ``None``: before the first stage

        def is_later() -> bool:
            return stages.index(self._stage_of(launcher)) > stages.index(kill.stage)

        def is_saving() -> bool:
            saved = max(map(steps_of_checkpoint, complete_checkpoints(checkpoints)), default=0)
            is_enough = saved >= kill.fraction * STEPS and any(checkpoints.glob(f"*{UNFINISHED}"))
            # A save may be too quick for its unfinished files to be seen. Therefore the kill comes
            # before the last checkpoint at the latest.
            return is_enough or saved >= STEPS - CHECKPOINT_INTERVAL

        def has_started() -> bool:
            return _modification_time(work / BEGUN) not in (None, previous_start)

        self._poll(launcher, lambda: is_later() or has_started())
        # A stage writes ``work/artifact``. Publishing starts when this folder is moved elsewhere.
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
        """Waits until the condition holds or the launcher has ended.

        Args:
            launcher: The launcher.
            condition: The condition.
            pause: Seconds between two checks of the condition.
        """
        deadline = time.monotonic() + HANG_SECONDS
        while launcher.poll() is None and not condition():
            assert time.monotonic() < deadline, "the launcher hangs"
            time.sleep(pause)


def _modification_time(file: Path) -> int | None:
    """Returns the time in nanoseconds; ``None`` if there is no such file."""
    return file.stat().st_mtime_ns if file.exists() else None


def processes_of(launcher_pid: int) -> dict[str, list[psutil.Process]]:
    """Returns the running processes of each type in ``VICTIMS``."""
    launcher = psutil.Process(launcher_pid)
    launched = launcher.children()
    servers = [process for process in launched if "recipes.core.fork_server" in process.cmdline()]
    # The launcher starts a stage directly, or lets a fork server start it.
    stages = [process for process in launched if process not in servers]
    stages += [stage for server in servers for stage in server.children()]
    children = [child for stage in stages for child in stage.children(recursive=True)]
    return dict(zip(VICTIMS, ([launcher], stages, servers, children), strict=True))
