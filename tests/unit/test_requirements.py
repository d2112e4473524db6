"""Tests the lock files: pins are in pyproject.toml's ranges, have hashes, and are up to date."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from recipes.core.files import REPO_ROOT
from recipes.core.versions import RESULT_LIBRARIES
from tests.support.contributing import copy_with

REQUIREMENTS = REPO_ROOT / "requirements"
LOCK_FILES = ("launcher.txt", "engine.txt", "stack.txt", "dev.txt", "torch.txt")
PIN = re.compile(
    r"^([\w.-]+)==(\S+) ; (.+?) \\$((?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)+)\n", re.M
)
"""Matches a pinned package. The groups are its name, version, marker and lines of hashes."""
PYTHONS = ("3.11.0", "3.11.99", "3.12.0", "3.12.99")
"""The first release of each supported version of Python, and a number above its last release."""
NO_NETWORK = re.compile(r"Failed to fetch|error sending request|Network connectivity is disabled")
"""Matches uv's errors if it cannot reach a package index."""


def pins(file: Path, python: str) -> dict[str, str]:
    """Maps the packages that a lock file installs on Linux with a version of Python to versions."""
    platform = {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "implementation_name": "cpython",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    return {
        name: version
        for name, version, marker, _ in PIN.findall(file.read_text())
        if Marker(marker).evaluate(platform)
    }


def ranges(*extras: str) -> list[Requirement]:
    """Returns the requirements of extras of pyproject.toml."""
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = [line for name in extras for line in optional[name]]
    # An extra may include another extra of this project, which is not a package to pin.
    return [Requirement(line) for line in lines if not line.startswith(project["name"])]


@pytest.mark.parametrize("name", LOCK_FILES)
def test_every_pin_has_a_hash(name: str) -> None:
    """``PIN`` matches only pins with hashes, so only comments remain without its matches."""
    remainder = PIN.sub("", (REQUIREMENTS / name).read_text())
    assert [line for line in remainder.splitlines() if not line.startswith("#")] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_within_the_ranges(python: str) -> None:
    launcher, engine, stack, dev, torch = (pins(REQUIREMENTS / name, python) for name in LOCK_FILES)
    # Each file has all pins of the previous one, with the same versions.
    assert launcher.items() <= engine.items() <= stack.items() <= dev.items()
    shared = dev.keys() & torch.keys()
    assert {name: dev[name] for name in shared} == {name: torch[name] for name in shared}
    for versions, extras in (
        (launcher, ["launcher"]),
        (
            stack | {"torch": torch["torch"]},
            ["cpu", "launcher", "mlflow", "tasks", "train", "wandb"],
        ),
        (dev | torch, ["dev", "docs"]),
    ):
        for requirement in ranges(*extras):
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), requirement


@pytest.mark.parametrize(
    ("name", "pattern"), [("stack.txt", "transformer-engine"), ("engine.txt", "transformers$")]
)
def test_lock_files_of_images_lack_packages_of_the_base_image(name: str, pattern: str) -> None:
    """The build of an image could replace packages of the base image that the lock file pins."""
    locked = pins(REQUIREMENTS / name, PYTHONS[-1])
    base_image_package = re.compile(rf"torch(vision)?$|triton$|cuda-|nvidia-(cu|nc|nv)|{pattern}")
    assert not [package for package in locked if base_image_package.match(package)]


def test_libraries_in_fingerprints_have_one_version() -> None:
    """pyproject.toml requires one exact version of each library except torch.

    With a range, an image could keep its own version. The fingerprints of stages in this image
    would still contain the locked version.
    """
    exact = {item.name for item in ranges("train") if str(item.specifier).startswith("==")}
    assert set(RESULT_LIBRARIES) - exact == {"torch"}  # images have their own builds of torch


def test_kernels_package_is_not_pinned() -> None:
    """With this package, transformers 4.57 runs code that a config.json names (CVE-2026-4372)."""
    assert "kernels" not in pins(REQUIREMENTS / "dev.txt", PYTHONS[-1])


def make(target: str, copy: Path) -> None:
    """Runs a target of the Makefile in a copy of the repository, with this environment's packages.

    ``--old-file=install`` makes the target skip its prerequisite ``install``. The variables of a
    calling ``make`` are removed.

    Args:
        target: The target.
        copy: Empty folder for the copy.
    """
    copy_with(copy)
    shutil.copy(REPO_ROOT / "Makefile", copy)
    env = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS")}
    command = ["make", "--old-file=install", target, f"VENV={sys.prefix}"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, env=env)
    if NO_NETWORK.search(done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr


def test_make_lock_keeps_the_pins(tmp_path: Path) -> None:
    make("lock", tmp_path)
    for name in LOCK_FILES:
        for python in PYTHONS:
            assert pins(tmp_path / "requirements" / name, python) == pins(
                REQUIREMENTS / name, python
            )


def test_make_sbom_lists_installed_packages(tmp_path: Path) -> None:
    make("sbom", tmp_path)
    components = json.loads((tmp_path / "sbom.json").read_text())["components"]
    names = {canonicalize_name(component["name"]) for component in components}
    assert {"torch", "nemo-toolkit", "megatron-core", "pip-licenses"} <= names


def test_licences_of_all_packages_are_listed() -> None:
    command = [Path(sys.prefix, "bin", "pip-licenses"), "--format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    licences = {package["Name"]: package["License"] for package in json.loads(done.stdout)}
    assert "Apache" in licences["transformers"]
    assert all(licences.values())
