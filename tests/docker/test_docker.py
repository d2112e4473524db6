"""Runs stages in containers of a real Docker daemon, as a user who is not root."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes.core.manifest import WORK
from recipes.core.run_state import BEGUN
from tests.docker.daemon import GROUP, IMAGE, Docker, mounts
from tests.slurm.cluster import wait_for
from tests.support.installing import require_programs
from tests.support.launcher import LAUNCHER
from tests.support.models import EVEN, write_tiny_model
from tests.support.runs import manifest_of, settings, tiny

USER = 4200
"""User and group ID of the launcher and of its containers."""
SECRET = "a_token_that_no_file_may_hold"
SETPRIV = [
    "setpriv",
    *(f"--reuid={USER}", f"--regid={USER}", f"--groups={GROUP}"),
    # The launcher runs outside of containers. There, only root may be able to read this Python and
    # pytest's folders, so the launcher may read all files.
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]
ENGINE_STAGES = ["build_teacher_engine", "build_engine", "measure_speed"]
STAGES = ["import_hf", "prepare_data", "score", "prune", *ENGINE_STAGES]
STUDENT_INPUTS = ("build_engine.inputs.checkpoint", "measure_speed.inputs.student")
"""Settings of inputs that this file replaces by the pruned model, so that no training is needed."""


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    """The client of a running daemon. Tests are skipped if containers cannot run."""
    require_programs("Docker", "dockerd", "docker", "containerd", "runc")
    with Docker.running() as client_or_reason:
        if isinstance(client_or_reason, str):
            pytest.skip(client_or_reason)
        yield client_or_reason


@dataclass(frozen=True)
class Run:
    """A run directory, and the command of the launcher that each test starts on it."""

    docker: Docker
    directory: Path
    overrides: tuple[str, ...]

    def start(self) -> subprocess.Popen[str]:
        """Starts the launcher as ``USER`` in its own process group, as a terminal does."""
        home = self.directory.parent
        variables = {
            "PATH": os.environ["PATH"],
            "DOCKER_HOST": self.docker.host,
            "HOME": str(home),
            "NEMO_RECIPES_CACHE": str(home / "cache"),
            "HF_TOKEN": SECRET,
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "160",
        }
        return subprocess.Popen(
            [*SETPRIV, sys.executable, LAUNCHER, *self.overrides],
            cwd=home,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # If a shell runs pytest as a background job, pytest ignores SIGINT. Without this call,
            # the launcher would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def start_import(self) -> tuple[subprocess.Popen[str], str]:
        """Starts the launcher and waits until ``import_hf`` runs in a container.

        Returns:
            The launcher's process, and the container's name.
        """
        begun_file = self.directory / "import_hf" / WORK / BEGUN  # written by the running stage
        begun_file.unlink(missing_ok=True)
        launcher = self.start()
        wait_for(lambda: begun_file.exists() or launcher.poll() is not None, 300)
        assert launcher.poll() is None, launcher.communicate()[0]
        [container] = self.docker.containers()
        return launcher, container


@pytest.fixture(scope="module")
def run(docker: Docker, text_file: Path) -> Iterator[Run]:
    """A run of a tiny model that no test has started yet."""
    home = Path(tempfile.mkdtemp(prefix="home"))
    model = write_tiny_model(home / "teacher", text_file, **EVEN)
    text = Path(shutil.copy(text_file, home))
    # In containers, ``USER`` cannot read pytest's folders, so all files are copied and given away.
    for path in (home, *home.rglob("*")):
        os.chown(path, USER, USER)
    overrides = (
        "recipe=llama_depth_prune",
        "cluster=docker",
        *("tasks=null", "engine=openvino"),
        *(f"stages.{name}=prune" for name in STUDENT_INPUTS),
        *settings("measure_speed", prompt_tokens=[16], new_tokens=4, repetitions=1),
        f"cluster.images.default={IMAGE}",
        # By default, the launcher sets an unlimited memlock. The daemon may raise a hard limit only
        # with all capabilities of root, so this option keeps the present hard limit.
        f'cluster.options=["--ulimit=memlock={resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]}"]',
        f"cluster.mounts=[{','.join(mounts())}]",
        "+cluster.env.OMP_NUM_THREADS='1'",
        *tiny(model, text, home / "run"),
        "stages.prune.target_num_layers=3",
        f"only=[{','.join(STAGES)}]",
    )
    yield Run(docker, home / "run", overrides)
    shutil.rmtree(home)
    assert docker.containers() == []


def test_a_killed_container_is_reported(run: Run) -> None:
    launcher, container = run.start_import()
    assert run.docker.run("kill", container).returncode == 0
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert "stage import_hf failed" in output
    assert "killed by SIGKILL" in output
    assert run.docker.containers() == []


def test_container_gets_the_token_and_is_removed_by_ctrl_c(run: Run) -> None:
    launcher, container = run.start_import()
    inspected = run.docker.run("inspect", "--format={{json .}}", container).stdout
    assert f"HF_TOKEN={SECRET}" in json.loads(inspected)["Config"]["Env"]
    os.killpg(launcher.pid, signal.SIGINT)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 130, output  # 128 + SIGINT
    assert "interrupted; the same command resumes" in output
    assert run.docker.containers() == []


def test_stages_complete_after_a_killed_launcher_left_a_container(run: Run) -> None:
    """The container outlives the launcher. The next launcher removes it, then completes all stages.

    All files of the run belong to ``USER``, and none contains the token.
    """
    launcher, container = run.start_import()
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.communicate()
    assert run.docker.containers("--filter=status=running") == [container]
    launcher = run.start()
    output, _ = launcher.communicate(timeout=800)
    assert launcher.returncode == 0, output
    for stage in STAGES:
        assert f"{stage}: complete" in output
    assert (manifest_of(run.directory, "prune").architecture or {})["num_layers"] == 3
    paths = [run.directory.parent, *run.directory.parent.rglob("*")]
    assert {(p.lstat().st_uid, p.lstat().st_gid) for p in paths} == {(USER, USER)}
    grep = subprocess.run(["grep", "-rl", SECRET, run.directory.parent], check=False)
    assert grep.returncode == 1  # grep's status if no file matches
