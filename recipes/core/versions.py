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

RESULT_LIBRARIES = ("torch", "megatron-core", "nemo_toolkit", "nvidia-modelopt", "transformers")
"""Libraries that stages compute with. Their versions are part of every fingerprint."""
TRANSFORMER_ENGINE = "transformer-engine"
OPENVINO_LIBRARIES = (
    *("openvino", "openvino-genai", "openvino-tokenizers"),
    *("nncf", "optimum", "optimum-intel"),
)
"""Libraries that build and run OpenVINO engines."""
STAGE_EXTRAS = ("launcher", "train", "cpu")
"""Extras of pyproject.toml that stages need. A launcher alone needs only the first one."""


@dataclass(frozen=True)
class Pin:
    """A library's required versions and its installed version."""

    name: str
    required: str
    installed: str | None

    @property
    def is_satisfied(self) -> bool:
        """Whether the installed version satisfies the requirement.

        The suffix of a container's own build is ignored: 2.9.0a0+nv25.9 counts as 2.9.0.
        """
        if self.installed is None:
            return False
        number = Version(self.installed).base_version
        return SpecifierSet(self.required).contains(number, prereleases=True)


def pins(extras: Iterable[str] = STAGE_EXTRAS) -> Iterator[Pin]:
    """Yields the pins of Python and of each library in the extras."""
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
    """Returns the version of an installed library, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def program_version(name: str) -> str | None:
    """Returns the version that a program on ``PATH`` prints; ``None`` if it prints none.

    Other lines of the output, such as the list of GPUs, differ between machines.
    """
    try:
        done = subprocess.run(
            [name, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"version: (.+)", done.stdout + done.stderr)
    return match[1].strip() if match else None


def result_versions(
    in_image: bool = False, libraries: Iterable[str] = (), programs: Iterable[str] = ()
) -> dict[str, str]:
    """Returns the versions that are part of a fingerprint, by library.

    A build tag such as ``+cpu`` is left out: builds of one version have the same source, and a
    login node must compute the same fingerprint as a node with GPUs. TransformerEngine is left out,
    too, because a login node does not have it. So is the image's name, so that a run can go on with
    another image or without one.

    Args:
        in_image: Whether the stage runs in an image, for which the locked versions count. They
            also count for libraries that are not installed here, for example on a login node.
        libraries: Libraries that only some stages compute with.
        programs: Programs that the stage runs if they are on ``PATH``.
    """
    names = (*RESULT_LIBRARIES, "tokenizers", *libraries)
    installed = {name: None if in_image else installed_version(name) for name in names}
    versions = {
        name: Version(version).base_version if version else locked_version(name)
        for name, version in installed.items()
    }
    optional = {name: None if in_image else program_version(name) for name in programs}
    return versions | {name: version for name, version in optional.items() if version}


@cache
def locked_version(name: str) -> str:
    """Returns a library's version in the lock files in ``requirements``."""
    pattern = re.compile(rf"^{re.sub('[-_.]', '[-_.]', name)}==([^ ;]+)", re.MULTILINE)
    texts = ((REPO_ROOT / "requirements" / f).read_text() for f in ("stack.txt", "torch.txt"))
    return next(match[1] for text in texts if (match := pattern.search(text)))


def installed_versions() -> dict[str, str]:
    """Returns the installed versions that a manifest records."""
    names = (*RESULT_LIBRARIES, TRANSFORMER_ENGINE, "numpy", "openvino")
    versions = {name: version for name in names if (version := installed_version(name))}
    return {"python": sys.version.split()[0], **versions}


def version_differences(versions: Mapping[str, str]) -> list[str]:
    """Returns a text for each library that stages compute with whose installed version differs.

    Args:
        versions: Versions in an input's manifest. Libraries that are missing on one side are
            ignored, and so are build tags such as ``+cpu``.
    """
    here, names = installed_versions(), {*RESULT_LIBRARIES, TRANSFORMER_ENGINE}
    return [
        f"{name} {versions[name]} → {here[name]}"
        for name in sorted(names & here.keys() & versions.keys())
        if Version(versions[name]).base_version != Version(here[name]).base_version
    ]


@cache
def git_sha() -> str | None:
    """Returns this checkout's commit, with a suffix if files were changed; ``None`` without git."""
    command = ["git", "-C", str(REPO_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
