"""Reads the installed, required and locked versions of libraries. Does not import torch."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from recipes.core.files import REPO_ROOT
from recipes.core.snapshot import LOCKS

RESULT_LIBRARIES = ("torch", "megatron-core", "nemo_toolkit", "nvidia-modelopt", "transformers")
"""Libraries whose code computes the results of stages. Their versions are in every fingerprint."""
TRANSFORMER_ENGINE = "transformer-engine"
"""A library that also computes results. Fingerprints omit it, because login nodes lack it."""
OPENVINO_LIBRARIES = (
    *("openvino", "openvino-genai", "openvino-tokenizers"),
    *("nncf", "optimum", "optimum-intel"),
)
"""Libraries that build and run OpenVINO engines."""
STAGE_EXTRAS = ("launcher", "train", "cpu")
"""Extras of pyproject.toml that stages need. The launcher needs only ``launcher``."""


@dataclass(frozen=True)
class Pin:
    """A library's required versions and its installed version."""

    name: str
    required: str
    """Version specifier, such as ``>=2.9,<3``."""
    installed: str | None
    """``None`` if the library is not installed."""

    @property
    def is_satisfied(self) -> bool:
        """Whether the installed version satisfies the requirement."""
        if self.installed is None:
            return False
        # Omits suffixes of builds and pre-releases: NGC containers have 2.9.0a0+nv25.9 for 2.9.0.
        base_version = Version(self.installed).base_version
        return SpecifierSet(self.required).contains(base_version, prereleases=True)


def pins(extras: Iterable[str] = STAGE_EXTRAS) -> Iterator[Pin]:
    """Yields a pin for Python, and one for each library in the extras of pyproject.toml."""
    with (REPO_ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    yield Pin("python", project["requires-python"], sys.version.split()[0])
    for extra in extras:
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            # An extra may include another extra of this project: "nemo-recipes[launcher]".
            if requirement.name != project["name"]:
                name = requirement.name
                yield Pin(name, str(requirement.specifier), installed_version(name))


@cache
def installed_version(name: str) -> str | None:
    """Returns a library's installed version without importing it; ``None`` if not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def program_version(name: str) -> str | None:
    """Returns what a program prints after ``version:``; ``None`` without such a program or text.

    Other lines of the output, such as the list of GPUs, differ between machines.
    """
    try:
        completed = subprocess.run(
            [name, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"version: (.+)", completed.stdout + completed.stderr)
    return match[1].strip() if match else None


def result_versions(
    in_image: bool = False, libraries: Iterable[str] = (), programs: Iterable[str] = ()
) -> dict[str, str]:
    """Returns the versions that are part of a fingerprint, by library or program.

    A login node must compute the same fingerprint as a node with GPUs. So build tags such as
    ``+cpu`` are removed: builds of one version have the same source. Fingerprints do not include
    the image's name, because a run may be resumed with another image or without an image.

    Args:
        in_image: Whether the stage runs in a container image. If so, returns locked versions.
            Otherwise returns installed versions, and locked versions only of libraries that are not
            installed here, for example on a login node.
        libraries: Further libraries that the stage computes with.
        programs: Programs that the stage runs. Omits all programs of a stage in an image, and
            programs that are not on ``PATH``.
    """
    names = (*RESULT_LIBRARIES, "tokenizers", *libraries)
    installed = {name: None if in_image else installed_version(name) for name in names}
    versions = {
        name: Version(version).base_version if version else locked_version(name)
        for name, version in installed.items()
    }
    if in_image:
        return versions
    program_versions = {name: program_version(name) for name in programs}
    return versions | {name: version for name, version in program_versions.items() if version}


@cache
def locked_version(name: str) -> str:
    """Returns a library's version in the lock files. Raises ``StopIteration`` if they lack it."""
    any_separator = re.sub("[-_.]", "[-_.]", name)  # pip treats -, _ and . in names as equal
    pattern = re.compile(rf"^{any_separator}==([^ ;]+)", re.MULTILINE)
    texts = ((REPO_ROOT / lock).read_text() for lock in LOCKS)
    return next(match[1] for text in texts if (match := pattern.search(text)))


def installed_versions() -> dict[str, str]:
    """Returns the installed versions that a manifest records, by library. Includes Python."""
    names = (*RESULT_LIBRARIES, TRANSFORMER_ENGINE, "numpy", "openvino")
    versions = {name: version for name in names if (version := installed_version(name))}
    return {"python": sys.version.split()[0], **versions}


def version_differences(versions: Mapping[str, str]) -> list[str]:
    """Compares the versions in an input's manifest with the installed versions.

    Only libraries that compute results count. Ignores build tags such as ``+cpu``, and libraries
    that are not in the manifest or not installed. Returns texts such as "torch 2.9.0 → 2.9.1".
    """
    installed = installed_versions()
    names = {*RESULT_LIBRARIES, TRANSFORMER_ENGINE} & installed.keys() & versions.keys()
    return [
        f"{name} {versions[name]} → {installed[name]}"
        for name in sorted(names)
        if Version(versions[name]).base_version != Version(installed[name]).base_version
    ]


@cache
def git_sha() -> str | None:
    """Returns this checkout's commit, with ``-dirty`` if files changed; ``None`` without git."""
    command = ["git", "-C", str(REPO_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
