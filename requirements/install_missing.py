"""Installs the packages of a lock file that are missing or whose installed version does not fit.

    python install_missing.py [--exact] LOCK COMMAND...

``LOCK`` is a file in ``requirements/``. ``COMMAND``, such as ``pip install --no-deps -r``, must
install the packages of a requirements file, but not their dependencies. The name of this file is
appended to the command.

Without ``--exact``, an installed version fits if it is allowed by pyproject.toml and by all
installed packages of the lock. With ``--exact``, only the version in the lock fits.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# pip's own copy of packaging, since the environment may not have the package yet.
from pip._vendor.packaging.markers import Marker
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import Version

PIN = re.compile(r"^([\w.-]+)==(\S+) ; (.+?) \\\n(?:    .*\n?)+", re.M)
"""Matches a line such as ``numpy==2.0.1 ; python_version >= '3.11' \\``, with name, version and
marker as groups 1 to 3, and the indented lines with hashes below it."""
MAX_PASSES = 5
"""Largest number of passes that install packages. A newly installed package may conflict with other
packages. Then the next pass replaces those packages."""


def installed_version(name: str) -> str | None:
    """Returns the version of a package; ``None`` if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def satisfies(requirement: Requirement) -> bool:
    """Returns whether the installed version is in the required range.

    A build in an image of NVIDIA may have the version ``2.9.0a0+nv25``, which counts as ``2.9.0``.
    """
    version = installed_version(requirement.name)
    return version is not None and requirement.specifier.contains(
        Version(version).base_version, prereleases=True
    )


def direct_requirements(project: Path) -> list[Requirement]:
    """Returns the requirements of the build and of all extras in ``project``, a pyproject.toml.

    An extra can include another extra by requiring the project itself. Such lines are omitted.
    """
    content = tomllib.loads(project.read_text(encoding="utf-8"))
    extras = content["project"]["optional-dependencies"].values()
    lines = [*content["build-system"]["requires"], *(line for extra in extras for line in extra)]
    name = content["project"]["name"]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != name]


def unfit_packages(pins: dict[str, str], direct: list[Requirement]) -> Iterator[str]:
    """Yields packages that are missing, out of range, or in conflict with another package.

    ``pins`` has the lock's version of each package, ``direct`` the requirements of pyproject.toml.
    """
    # The extras of each package that pyproject.toml requires. "" means no extra.
    extras = {canonicalize_name(r.name): r.extras or {""} for r in direct}
    yield from (name for name in pins if installed_version(name) is None)
    yield from (canonicalize_name(r.name) for r in direct if not satisfies(r))
    for name in pins:
        lines = (metadata.requires(name) or []) if installed_version(name) else []
        for required in map(Requirement, lines):
            dependency, marker = canonicalize_name(required.name), required.marker
            applies = marker is None or any(
                marker.evaluate({"extra": extra}) for extra in extras.get(name, {""})
            )
            if applies and dependency in pins and not satisfies(required):
                # If the dependency has the lock's version, replace the package that refuses it.
                is_locked = installed_version(dependency) == pins[dependency]
                yield name if is_locked else dependency


def main(lock: Path, command: list[str], exact: bool) -> None:
    """Installs until everything fits. Without ``exact``, prints which versions were not the lock's.

    Exits with an error message if packages still do not fit after ``MAX_PASSES``.
    """
    pin_matches = {
        canonicalize_name(match[1]): match
        for match in PIN.finditer(lock.read_text(encoding="utf-8"))
        if Marker(match[3]).evaluate()
    }
    pins = {name: match[2] for name, match in pin_matches.items()}
    direct = direct_requirements(lock.resolve().parent.parent / "pyproject.toml")
    versions_before = {name: installed_version(name) for name in pins}
    for _ in range(MAX_PASSES):
        importlib.invalidate_caches()
        to_install = {name for name in pins if installed_version(name) != pins[name]}
        if not exact:
            to_install &= set(unfit_packages(pins, direct))
        if not to_install:
            break
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("".join(pin_matches[name][0] for name in sorted(to_install)))
            file.flush()
            subprocess.run([*command, file.name], check=True)
    else:  # the loop ended without ``break``
        listed = ", ".join(
            f"{name} {installed_version(name)} instead of {pins[name]}"
            for name in sorted(to_install)
        )
        fix = "remove the environment and install again"
        sys.exit(f"error: wrong versions are installed: {listed}\n  fix: {fix}")
    if not exact:
        print(f"{'package':32} {'image':24} {'lock':16}")
        for name, version in versions_before.items():
            if version != pins[name]:
                action = "kept" if installed_version(name) == version else "installed"
                print(f"{name:32} {version or '-':24} {pins[name]:16} {action}")


if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if word != "--exact"]
    main(Path(arguments[0]), arguments[1:], exact="--exact" in sys.argv[1:])
