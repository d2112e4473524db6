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
    for job in WORKFLOW["jobs"].values():
        yield from job["steps"]


def test_the_workflow_has_read_access_and_a_push_cancels_the_previous_run() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in WORKFLOW["jobs"].values())
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True


def test_make_targets_of_the_workflow_exist() -> None:
    makefile = (REPO_ROOT / "Makefile").read_text()
    commands = [step.get("run", "") for step in steps()]
    targets = {command.split()[1] for command in commands if command.startswith("make ")}
    assert targets == {"lint", "test"}
    assert all(re.search(rf"^{target}: ", makefile, re.M) for target in targets)


def test_actions_have_a_major_version() -> None:
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"actions/[\w-]+@v\d+", name)] == []


def test_the_cache_key_covers_the_files_of_the_installation_stamp() -> None:
    stamped = re.findall(r"sha256sum (.+)\)", (REPO_ROOT / "install.sh").read_text())[0].split()
    [key] = {step["with"]["key"] for step in steps() if "cache" in step.get("uses", "")}
    assert re.findall(r"'([^']+)'", key) == stamped


@pytest.mark.parametrize("job", WORKFLOW["jobs"])
def test_python_versions_of_the_workflow_are_supported(job: str) -> None:
    spec = WORKFLOW["jobs"][job]
    with (REPO_ROOT / "pyproject.toml").open("rb") as file:
        supported = SpecifierSet(tomllib.load(file)["project"]["requires-python"])
    [configured] = [s["with"]["python-version"] for s in spec["steps"] if "setup-python" in str(s)]
    versions = spec["strategy"]["matrix"]["python"] if "matrix" in configured else [configured]
    assert all(version in supported for version in versions)
