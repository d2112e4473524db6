"""Pins are in the ranges of pyproject.toml, have hashes, and are unchanged by ``make lock``."""

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
FILES = ("launcher.txt", "engine.txt", "stack.txt", "dev.txt", "torch.txt")
PIN = re.compile(
    r"^([\w.-]+)==(\S+) ; (.+?) \\$((?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)+)\n", re.M
)
PYTHONS = ("3.11.0", "3.11.99", "3.12.0", "3.12.99")
"""The first release of each supported version of Python, and a number above its last release."""
NO_NETWORK = re.compile(r"Failed to fetch|error sending request|Network connectivity is disabled")


def pins(file: Path, python: str) -> dict[str, str]:
    """Returns the versions that a file installs on Linux with a version of Python."""
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
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = [line for name in extras for line in optional[name]]
    # An extra may include another extra of this project, which is not a package to pin.
    return [Requirement(line) for line in lines if not line.startswith(project["name"])]


@pytest.mark.parametrize("name", FILES)
def test_every_pin_has_a_hash(name: str) -> None:
    remainder = PIN.sub("", (REQUIREMENTS / name).read_text())
    assert [line for line in remainder.splitlines() if not line.startswith("#")] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_within_the_ranges(python: str) -> None:
    launcher, engine, stack, dev, torch = (pins(REQUIREMENTS / name, python) for name in FILES)
    assert launcher.items() <= engine.items() <= stack.items() <= dev.items()
    shared = dev.keys() & torch.keys()
    assert {name: dev[name] for name in shared} == {name: torch[name] for name in shared}
    for pinned, extras in (
        (launcher, ["launcher"]),
        (
            stack | {"torch": torch["torch"]},
            ["cpu", "launcher", "mlflow", "tasks", "train", "wandb"],
        ),
        (dev | torch, ["dev", "docs"]),
    ):
        for required in ranges(*extras):
            assert required.specifier.contains(pinned[canonicalize_name(required.name)]), required


@pytest.mark.parametrize(
    ("name", "pattern"), [("stack.txt", "transformer-engine"), ("engine.txt", "transformers$")]
)
def test_an_image_keeps_the_packages_of_its_base_image(name: str, pattern: str) -> None:
    installed = pins(REQUIREMENTS / name, PYTHONS[-1])
    of_base_image = re.compile(rf"torch(vision)?$|triton$|cuda-|nvidia-(cu|nc|nv)|{pattern}")
    assert not [name for name in installed if of_base_image.match(name)]


def test_libraries_in_fingerprints_have_one_version() -> None:
    """With a range, an image could keep its own version of a library, but the fingerprints of the
    stages in this image would name the locked version."""
    exact = {item.name for item in ranges("train") if str(item.specifier).startswith("==")}
    assert set(RESULT_LIBRARIES) - exact == {"torch"}


def test_kernels_package_is_not_pinned() -> None:
    """With this package, transformers 4.57 runs code that a config.json names (CVE-2026-4372)."""
    assert "kernels" not in pins(REQUIREMENTS / "dev.txt", PYTHONS[-1])


def make(target: str, copy: Path) -> None:
    """Runs a target in a copy of the repository, without installing anything."""
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
    for name in FILES:
        for python in PYTHONS:
            assert pins(tmp_path / "requirements" / name, python) == pins(
                REQUIREMENTS / name, python
            )


def test_make_sbom_lists_what_is_installed(tmp_path: Path) -> None:
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
