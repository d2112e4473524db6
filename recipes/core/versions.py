"""The tested set of libraries, as pyproject.toml pins it, against what is installed. Torch-free."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from recipes.core.files import REPO_ROOT


@dataclass(frozen=True)
class Pin:
    """One library: what is wanted and what is there."""

    name: str
    wanted: str
    found: str | None
    """Installed version; ``None`` without one."""

    @property
    def holds(self) -> bool:
        """Whether the installed version is one that is wanted.

        Of a container's own build, such as 2.9.0a0+nv25.9, the number counts and not the suffix.
        """
        if self.found is None:
            return False
        number = Version(self.found).base_version
        return SpecifierSet(self.wanted).contains(number, prereleases=True)


def pins() -> Iterator[Pin]:
    """Python and every library that is pinned."""
    with (REPO_ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    yield Pin("python", project["requires-python"], sys.version.split()[0])
    for line in project["dependencies"]:
        requirement = Requirement(line)
        yield Pin(requirement.name, str(requirement.specifier), installed(requirement.name))


def installed(name: str) -> str | None:
    """Version of an installed library, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


RECORDED_VERSIONS = (
    "nemo_toolkit",
    "megatron-core",
    "nvidia-modelopt",
    "transformers",
    "torch",
    "numpy",
    "openvino",
)


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that can change a result."""
    found = {name: version for name in RECORDED_VERSIONS if (version := installed(name))}
    return {"python": sys.version.split()[0], **found}


def git_sha() -> str | None:
    """Commit of this checkout, marked when it has local changes."""
    command = ["git", "-C", str(REPO_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
