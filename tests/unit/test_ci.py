"""Static checks of ``.github/workflows/ci.yml``."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from recipes.core.files import REPO_ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKFLOW: dict[Any, Any] = yaml.safe_load((REPO_ROOT / ".github/workflows/ci.yml").read_text())


def steps() -> Iterator[dict[str, Any]]:
    """Yields the steps of all jobs."""
    for job in WORKFLOW["jobs"].values():
        yield from job["steps"]


def test_the_workflow_has_read_access_and_a_push_cancels_the_previous_run() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in WORKFLOW["jobs"].values())
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True


def test_the_workflow_runs_make_lint_and_make_test() -> None:
    makefile = (REPO_ROOT / "Makefile").read_text()
    commands = [step.get("run", "") for step in steps()]
    targets = {command.split()[1] for command in commands if command.startswith("make ")}
    assert targets == {"lint", "test"}
    assert all(re.search(rf"^{target}: ", makefile, re.M) for target in targets)


def test_actions_are_of_github_and_have_a_major_version() -> None:
    actions = [step["uses"] for step in steps() if "uses" in step]  # such as actions/checkout@v4
    assert actions
    assert [name for name in actions if not re.fullmatch(r"actions/[\w-]+@v\d+", name)] == []


def test_the_cache_key_covers_the_files_of_the_installation_stamp() -> None:
    """If one of these files changes, ``install.sh`` installs again, and CI starts a new cache."""
    script = (REPO_ROOT / "install.sh").read_text()
    stamped_files = re.findall(r"sha256sum (.+)\)", script)[0].split()
    [key] = {step["with"]["key"] for step in steps() if "cache" in step.get("uses", "")}
    # The key has each file in quotes, as an argument of hashFiles.
    assert re.findall(r"'([^']+)'", key) == stamped_files


@pytest.mark.parametrize("job", WORKFLOW["jobs"])
def test_python_versions_of_the_workflow_are_supported(job: str) -> None:
    """A job either names its version, or has a matrix of versions."""
    definition = WORKFLOW["jobs"][job]
    with (REPO_ROOT / "pyproject.toml").open("rb") as file:
        supported = SpecifierSet(tomllib.load(file)["project"]["requires-python"])
    [version_setting] = [
        step["with"]["python-version"]
        for step in definition["steps"]
        if "setup-python" in step.get("uses", "")
    ]
    versions = [version_setting]
    if "matrix" in version_setting:  # "${{ matrix.python }}"
        versions = definition["strategy"]["matrix"]["python"]
    assert all(version in supported for version in versions)
