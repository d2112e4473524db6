"""Versions of libraries: installed, pinned in pyproject.toml, and locked. Torch-free."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from recipes.core.files import REPO_ROOT

RESULT_LIBRARIES = ("torch", "megatron-core", "nemo_toolkit", "nvidia-modelopt", "transformers")
"""Libraries whose versions are part of a fingerprint."""


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


@cache
def installed(name: str) -> str | None:
    """Returns the version of an installed library, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def result_versions(in_image: bool = False) -> dict[str, str]:
    """Returns the versions that are part of a fingerprint, by library.

    The installed version counts, or else the locked one: a login node need not have the stack. For
    a stage in an image the locked version counts, since images are built from the lock and what is
    installed outside does not matter.

    Build tags such as ``+cpu`` are left out. Builds of one version have the same source, and a plan
    must be the same on a machine without a GPU as on the nodes.
    """
    found = {name: None if in_image else installed(name) for name in RESULT_LIBRARIES}
    return {
        name: Version(version).base_version if version else locked(name)
        for name, version in found.items()
    }


@cache
def locked(name: str) -> str:
    """Returns the version of a library in ``requirements``."""
    pattern = re.compile(rf"^{re.sub('[-_.]', '[-_.]', name)}==([^ ;]+)", re.MULTILINE)
    texts = ((REPO_ROOT / "requirements" / f).read_text() for f in ("stack.txt", "torch.txt"))
    return next(match[1] for text in texts if (match := pattern.search(text)))


def installed_versions() -> dict[str, str]:
    """Returns the installed versions that a manifest records."""
    names = (*RESULT_LIBRARIES, "numpy", "openvino")
    found = {name: version for name in names if (version := installed(name))}
    return {"python": sys.version.split()[0], **found}


def git_sha() -> str | None:
    """Commit of this checkout, marked when it has local changes."""
    command = ["git", "-C", str(REPO_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
