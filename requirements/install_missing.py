"""Installs packages of a lock file that this Python does not have in a fitting version.

    python install_missing.py [--exact] LOCK COMMAND...

``COMMAND`` must install a requirements file, whose name is appended, without dependencies. An
installed version fits if pyproject.toml allows it and no package of the lock conflicts with it.
With ``--exact`` only the version in the lock fits.
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
MAX_PASSES = 5
"""A newly installed package may conflict with others, which the next pass then replaces."""


def installed(name: str) -> str | None:
    """Returns the version of a package; ``None`` if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def satisfies(requirement: Requirement) -> bool:
    """Whether the installed version is in range, without the suffix of an image's own build."""
    version = installed(requirement.name)
    return version is not None and requirement.specifier.contains(
        Version(version).base_version, prereleases=True
    )


def direct_requirements(project: Path) -> list[Requirement]:
    """Returns the requirements of all extras and of the build, not references to other extras."""
    content = tomllib.loads(project.read_text(encoding="utf-8"))
    extras = content["project"]["optional-dependencies"].values()
    lines = [*content["build-system"]["requires"], *(line for extra in extras for line in extra)]
    name = content["project"]["name"]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != name]


def misfits(pins: dict[str, str], direct: list[Requirement]) -> Iterator[str]:
    """Yields packages of the lock that are missing, out of range, or refused by another one."""
    extras = {canonicalize_name(r.name): r.extras or {""} for r in direct}
    yield from (name for name in pins if installed(name) is None)
    yield from (canonicalize_name(r.name) for r in direct if not satisfies(r))
    for name in pins:
        lines = (metadata.requires(name) or []) if installed(name) else []
        for required in map(Requirement, lines):
            dependency, marker = canonicalize_name(required.name), required.marker
            applies = marker is None or any(
                marker.evaluate({"extra": extra}) for extra in extras.get(name, {""})
            )
            if applies and dependency in pins and not satisfies(required):
                # If the dependency has the lock's version, the package that requires it is wrong.
                is_locked = installed(dependency) == pins[dependency]
                yield name if is_locked else dependency


def main(lock: Path, command: list[str], exact: bool) -> None:
    """Installs until everything fits. Prints packages that had another version than the lock's."""
    entries = {
        canonicalize_name(match[1]): match
        for match in PIN.finditer(lock.read_text(encoding="utf-8"))
        if Marker(match[3]).evaluate()
    }
    pins = {name: match[2] for name, match in entries.items()}
    direct = direct_requirements(lock.resolve().parent.parent / "pyproject.toml")
    before = {name: installed(name) for name in pins}
    for _ in range(MAX_PASSES):
        importlib.invalidate_caches()
        to_install = {n for n in pins if installed(n) != pins[n]}
        if not exact:
            to_install &= set(misfits(pins, direct))
        if not to_install:
            break
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("".join(entries[name][0] for name in sorted(to_install)))
            file.flush()
            subprocess.run([*command, file.name], check=True)
    else:
        listed = ", ".join(f"{n} {installed(n)} instead of {pins[n]}" for n in sorted(to_install))
        fix = "remove the environment and install again"
        sys.exit(f"error: wrong versions are installed: {listed}\n  fix: {fix}")
    if not exact:
        print(f"{'package':32} {'image':24} {'lock':16}")
        for name, version in before.items():
            if version != pins[name]:
                now = "kept" if installed(name) == version else "installed"
                print(f"{name:32} {version or '-':24} {pins[name]:16} {now}")


if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if word != "--exact"]
    main(Path(arguments[0]), arguments[1:], exact="--exact" in sys.argv[1:])
