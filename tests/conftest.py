"""Fixtures for all tests (text, a login node's interpreter), and the order of test files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.core.files import REPO_ROOT
from recipes.core.processes import prepare_imports
from tests.support.disks import large_disks
from tests.support.installing import require_package_index
from tests.support.text import write_text

LONGEST = (
    "test_cluster_recipes",
    "test_slurm",
    "test_readme",
    "test_chain",
    "test_layouts",
    "test_benchmarks",
    "test_logit_cache",
    "test_rehearsal",
    "test_recipes_in_miniature",
    "test_settings",
    "test_eight_kinds",
)
"""Test files that take minutes. They start first. Otherwise one worker could still run such a file
long after all other workers are done."""


def pytest_configure() -> None:
    """Lets tests import Megatron, as stages do, and makes this machine's Docker unreachable."""
    prepare_imports()
    del sys.modules["wandb"]  # prepare_imports blocks it, but tests of trackers import it
    os.environ["DOCKER_HOST"] = "unix:///no_docker.sock"  # there is no such socket
    # A shell's background job ignores Ctrl-C, and so would the programs that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests of ``LONGEST`` to the front. Otherwise the order of tests does not change."""
    positions = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: positions.get(item.path.stem, len(LONGEST)))  # a stable sort


@pytest.fixture
def large_disk() -> Iterator[None]:
    """Makes this machine's disk look large, so that plans of any size fit."""
    with large_disks():
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines with up to 1,200 paragraphs of English prose."""
    return write_text(tmp_path_factory.mktemp("text") / "topics.jsonl")


@pytest.fixture(scope="session")
def launcher_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment without torch, as on a login node.

    ``./install.sh launcher`` makes this environment. Tests are skipped without a package index.
    """
    venv = tmp_path_factory.mktemp("login_node") / "venv"
    env = {**os.environ, "VENV": str(venv), "PYTHON": sys.executable}
    done = subprocess.run(
        ["./install.sh", "launcher"],
        cwd=REPO_ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    require_package_index(done)
    assert done.returncode == 0, done.stderr
    return venv / "bin" / "python"
