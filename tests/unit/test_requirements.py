"""The lock: within the ranges of pyproject.toml, complete, hashed, and installed here."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch.reference.dependencies import sbom
from launch.reference.lock import (
    LOCKS,
    OF_THE_CONTAINER,
    PIN,
    PYTHONS,
    direct,
    environment,
    locked,
)
from recipes.core.files import REPO_ROOT
from tests.support.contributing import copy_with

HASHED = re.compile(r"([\w.-]+)==\S+(?: ; .+?)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n")
EDGES = [python for pythons in PYTHONS.values() for python in pythons]
ALL = ("stack.txt", "dev.txt", "torch.txt")
HEAD = "# python -m launch.reference.lock\n"
NO_NETWORK = re.compile(r"Failed to fetch|error sending request|Network connectivity is disabled")


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_accepted_without_a_hash(name: str) -> None:
    text = (LOCKS / name).read_text()
    assert HASHED.sub("", text) == HEAD
    assert set(HASHED.findall(text)) == {n for python in EDGES for n in locked(python, name)}


@pytest.mark.parametrize("python", EDGES)
def test_each_dependency_is_locked_within_its_range(python: str) -> None:
    found = locked(python, *ALL)
    wanted = direct("dev", "docs", "mlflow", "tasks", "wandb")
    assert [str(one) for one in wanted if not fits(one, found)] == []


def fits(wanted: Requirement, found: dict[str, str]) -> bool:
    number = found.get(canonicalize_name(wanted.name), "")
    return bool(number) and wanted.specifier.contains(number, prereleases=True)


@pytest.mark.parametrize("python", EDGES)
def test_what_these_need_is_locked_too(python: str) -> None:
    """As the packages say that are installed here; those of CUDA are not, on a CPU."""
    found = locked(python, *ALL)
    roots = {canonicalize_name(d.name): d.extras for d in direct("dev", "docs", "mlflow", "tasks")}
    missing = [
        f"{name}: {one}"
        for name in [*locked(python, "stack.txt", "dev.txt"), "torch", "torchvision"]
        for one in needs(name, roots.get(name, set()), environment(python))
        if not fits(one, found)
    ]
    assert missing == []


def needs(name: str, extras: set[str], where: dict[str, str]) -> Iterator[Requirement]:
    for text in distribution(name).requires or ():
        one = Requirement(text)
        given = ({**where, "extra": extra} for extra in ("", *extras))
        if one.marker is None or any(one.marker.evaluate(each) for each in given):
            yield one


def test_the_image_keeps_what_its_container_brings() -> None:
    found = locked(EDGES[-1], "stack.txt")
    assert [n for n in found if n in OF_THE_CONTAINER or re.match(r"nvidia-(cu|nc|nv)", n)] == []
    wanted = [d for d in direct("tasks") if canonicalize_name(d.name) not in OF_THE_CONTAINER]
    assert [str(one) for one in wanted if not fits(one, found)] == []


def test_the_tests_run_with_what_is_locked() -> None:
    found = locked(platform.python_version(), "stack.txt", "dev.txt")
    assert {name: version(name) for name in found} == found


def test_what_would_run_a_models_kernels_is_not_installed() -> None:
    """With it, transformers 4.57 runs code that a config.json names (CVE-2026-4372)."""
    assert "kernels" not in locked(EDGES[-1], *ALL)


def test_the_bill_of_materials_names_all_and_what_needs_what() -> None:
    made = sbom()
    names = {one["name"] for one in made["components"]}
    assert names - {"torch", "torchvision"} >= set(locked(EDGES[-1], "stack.txt", "dev.txt"))
    refs = {one["bom-ref"]: one["name"] for one in made["components"]}
    edges = {refs[d["ref"]]: {refs[one] for one in d["dependsOn"]} for d in made["dependencies"]}
    assert {"jinja2", "numpy", "torch"} <= edges["nncf"] | edges["torch"] | edges["nemo-toolkit"]
    assert "markupsafe" in edges["jinja2"]


def make(target: str, copy: Path) -> subprocess.CompletedProcess[str]:
    """What a person types, but that nothing is installed, in a copy of the repository."""
    copy_with(copy)
    shutil.copy(REPO_ROOT / "Makefile", copy)
    shutil.copytree(LOCKS, copy / LOCKS.name)
    command = ["make", "--old-file=install", target, f"VENV={sys.prefix}"]
    # Not what the make that runs the tests was told.
    env = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS")}
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, env=env)


def test_make_lock_keeps_what_is_locked(tmp_path: Path) -> None:
    """Hashes may be more than here: files are added to a version that is out already."""
    done = make("lock", tmp_path)
    if NO_NETWORK.search(done.stderr):
        pytest.skip("no index of packages can be reached")
    assert done.returncode == 0, done.stderr
    for name in ALL:
        text = (tmp_path / LOCKS.name / name).read_text()
        assert HASHED.sub("", text) == HEAD
        assert PIN.findall(text) == PIN.findall((LOCKS / name).read_text())


def test_make_sbom_writes_the_bill_of_materials(tmp_path: Path) -> None:
    done = make("sbom", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "sbom.json").read_text()) == sbom()
