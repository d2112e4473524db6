"""Kills a launcher, or something that it started, at a chosen moment of a stage."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.lock import LOCK
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import ARTIFACT, WORK
from recipes.core.metrics import METRICS
from recipes.core.run_state import BEGUN
from recipes.distillation.training import CHECKPOINTS, UNFINISHED, steps_in, whole_checkpoints
from tests.chaos.chain import CHECKPOINT_INTERVAL, STEPS
from tests.support import processes
from tests.support.launcher import wait_until_none_works_in
from tests.support.runs import HEALING

VICTIMS = ("launcher", "stage", "server", "helper")
"""The launcher; a stage's process or rank; what it is forked from, or torchrun; what it starts."""
MOMENTS = ("work", "launch", "publish", "save", "step")
"""While a stage works, before any does, while its result takes its place, while it saves, and when
it has done some steps since it saved."""
PATIENCE = 300


@dataclass(frozen=True)
class Kill:
    """What is to be killed, and when."""

    stage: str
    victim: str = "launcher"
    moment: str = "work"
    share: float = 0.5
    """Of the time that the undisturbed stage took, or of the steps to be saved or done before."""
    number: int = signal.SIGKILL

    @property
    def whole_group(self) -> bool:
        """Whether it is sent as a terminal sends Ctrl-C."""
        return self.number == signal.SIGINT


@dataclass(frozen=True)
class Hit:
    """What was killed."""

    stage: str
    """At which the launcher was then."""
    victim: str
    code: int
    """The launcher's exit status."""
    output: str


def draw(stage: str, number: int, rng: random.Random) -> Kill:
    """A kill of a stage at random."""
    moments = ["work", "work", "work", "publish", "launch"]
    moments += ["save", "step"] * 3 * (stage == "distill")
    return Kill(
        stage,
        rng.choices(VICTIMS, (4, 4, 1, 3))[0] if number == signal.SIGKILL else "launcher",
        rng.choice(moments) if number == signal.SIGKILL else "work",
        rng.random(),
        number,
    )


class Disturbed:
    """A command that is started, killed and started again.

    Args:
        words: The launcher's command line.
        run_dir: The run that it is for.
        folder: Where it is started; nothing else works there.
        seconds: What each stage takes undisturbed.
        environment: Variables besides one's own.
    """

    def __init__(
        self,
        words: list[str],
        run_dir: Path,
        folder: Path,
        seconds: Mapping[str, float],
        environment: Mapping[str, str],
    ) -> None:
        self._words, self._run_dir, self._folder = words, run_dir, folder
        self._seconds, self._environment = seconds, environment

    def start(self) -> subprocess.Popen[str]:
        """Starts the command."""
        with (self._folder / "output.txt").open("w") as output:
            return subprocess.Popen(
                [sys.executable, str(REPO_ROOT / "launch" / "run.py"), *self._words],
                cwd=self._folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "COLUMNS": "160", **self._environment},
                start_new_session=True,
            )

    def finish(self) -> tuple[int, str]:
        """Runs the command to its end."""
        code = self.start().wait(timeout=600)
        return code, self.output()

    def output(self) -> str:
        """What the newest start has said."""
        return (self._folder / "output.txt").read_text()

    def kill(self, kill: Kill) -> Hit | None:
        """Starts the command and kills; ``None`` if it was too late, and the command is done."""
        launcher = self.start()
        try:
            self._wait_for(kill, launcher)
            stage = self._stage_of(launcher) or "launcher"
            roles = roles_of(launcher.pid)
            victim = kill.victim if kill.victim in roles else "launcher"
            if launcher.poll() is not None:
                return None
            if kill.whole_group:
                os.killpg(launcher.pid, kill.number)
            else:
                os.kill(random.Random(kill.share).choice(roles[victim]), kill.number)
        except ProcessLookupError:  # it has just ended by itself
            victim = "none"
        if victim != "launcher":  # which says that it failed, or goes on if all was done
            self._poll(launcher, lambda: self._stage_of(launcher) != stage)
            launcher.kill()
        code = launcher.wait(timeout=PATIENCE)
        wait_until_none_works_in(self._folder)
        return Hit(stage, victim, code, self.output())

    def _stage_of(self, launcher: subprocess.Popen[str]) -> str | None:
        """The stage that this launcher is at, by its lock; an earlier one's may still stand."""
        try:
            held = json.loads((self._run_dir / LOCK).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return held["stage"] if held["pid"] == launcher.pid else None

    def _reached(self, launcher: subprocess.Popen[str], stage: str) -> bool:
        now = self._stage_of(launcher)
        return now is not None and HEALING.index(now) >= HEALING.index(stage)

    def _wait_for(self, kill: Kill, launcher: subprocess.Popen[str]) -> None:
        if kill.moment == "launch":
            time.sleep(3 * kill.share)
            return
        work = self._run_dir / kill.stage / WORK
        before = _changed(work / BEGUN)
        self._poll(launcher, lambda: self._reached(launcher, kill.stage))
        if self._stage_of(launcher) != kill.stage:
            return  # which was complete, so that it is the next one's turn
        begun = lambda: _changed(work / BEGUN) not in (None, before)  # noqa: E731
        self._poll(launcher, begun)
        if kill.moment == "publish":  # as soon as its artifact has left the place where it is made
            self._poll(launcher, (work / ARTIFACT).exists, pause=0)
            self._poll(launcher, lambda: not (work / ARTIFACT).exists(), pause=0)
        elif kill.moment == "save":  # another one, when a share of the steps is saved
            saved = work / CHECKPOINTS
            self._poll(
                launcher,
                lambda: self._stage_of(launcher) != kill.stage
                or (any(saved.glob(f"*{UNFINISHED}")) and _steps(saved) >= kill.share * STEPS)
                or _steps(saved) >= STEPS - CHECKPOINT_INTERVAL,  # all were too quick to be seen
                pause=0.001,
            )
        elif kill.moment == "step":
            metrics = self._run_dir / kill.stage / METRICS
            old = len(_text(metrics))  # of earlier starts

            def between() -> bool:
                done = re.findall(rf'"task": "{kill.stage}", "done": (\d+),', _text(metrics)[old:])
                step = int(done[-1]) if done else 0
                return step % CHECKPOINT_INTERVAL > 0 and step >= kill.share * STEPS

            self._poll(launcher, lambda: self._stage_of(launcher) != kill.stage or between())
        else:
            time.sleep(kill.share * self._seconds[kill.stage])

    def _poll(
        self, launcher: subprocess.Popen[str], condition: Callable[[], bool], pause: float = 0.005
    ) -> None:
        deadline = time.monotonic() + PATIENCE
        while launcher.poll() is None and not condition():
            assert time.monotonic() < deadline, "the launcher hangs"
            time.sleep(pause)


def _steps(checkpoints: Path) -> int:
    return max(map(steps_in, whole_checkpoints(checkpoints)), default=0)


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _changed(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def roles_of(launcher: int) -> dict[str, list[int]]:
    """Process ids below a launcher, by what they are."""
    children = processes.children()
    roles: dict[str, list[int]] = {"launcher": [launcher]}
    for child in children.get(launcher, []):
        command = processes.command(child)
        starts_others = "recipes.core.fork_server" in command or "torch.distributed.run" in command
        stages = children.get(child, []) if starts_others else [child]
        if starts_others:
            roles.setdefault("server", []).append(child)
        for stage in stages:
            roles.setdefault("stage", []).append(stage)
            waiting = children.get(stage, [])
            while waiting:
                helper = waiting.pop()
                roles.setdefault("helper", []).append(helper)
                waiting += children.get(helper, [])
    return roles
