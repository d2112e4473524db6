"""The Dockerfile, and the pins of the image, as far as they can be checked without building it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from recipes.core.files import REPO_ROOT

DOCKERFILE = REPO_ROOT / "Dockerfile"
PINS = REPO_ROOT / "launch" / "executors" / "image.txt"
OF_THE_CONTAINER = {"torch", "torchvision", "triton", "cuda-bindings", "transformer-engine"}


def pins() -> dict[str, Version]:
    lines = [line for line in PINS.read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(n): Version(v) for n, v in (line.split("==") for line in lines)}


def dependencies() -> list[Requirement]:
    with (REPO_ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["tasks"]]
    return [Requirement(text) for text in texts]


def test_dockerfile_is_clean() -> None:
    subprocess.run([Path(sys.executable).with_name("hadolint"), DOCKERFILE], check=True)


def test_image_runs_as_no_root_and_holds_no_secret() -> None:
    text = DOCKERFILE.read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    users = [re.findall(r"^USER (\S+)", stage, flags=re.MULTILINE) for stage in stages]
    assert users == [[], ["10001"], ["10001"]]  # the first only gives a program to the others
    assert not re.findall(r"^(?:ARG|ENV) .*(?:TOKEN|KEY|SECRET|PASS)", text, flags=re.MULTILINE)
    assert not re.findall(r"^(?:COPY|ADD) \.", text, flags=re.MULTILINE)


def test_image_has_every_dependency_in_its_bounds_but_the_containers_own() -> None:
    found = pins()
    for requirement in dependencies():
        name = canonicalize_name(requirement.name)
        if name in OF_THE_CONTAINER:
            assert name not in found
        else:
            assert requirement.specifier.contains(found[name], prereleases=True), requirement


def test_nothing_that_the_container_brings_is_replaced() -> None:
    own = [n for n in pins() if n in OF_THE_CONTAINER or re.match(r"nvidia-(cu|nc|nv)", n)]
    assert own == []
