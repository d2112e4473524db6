"""Installs the packages of a lock that this Python lacks or has in a version that does not fit.

    python install_missing.py [--exact] LOCK COMMAND...

``COMMAND`` installs the requirements of the file whose name is added to it, without dependencies.
In an image, a package stays if its version is in the range of pyproject.toml and all packages of
the lock accept it. With ``--exact`` every version must be the lock's.
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

# pip's own copy, since an environment may not have packaging yet.
from pip._vendor.packaging.markers import Marker
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import Version

PIN = re.compile(r"^([\w.-]+)==(\S+) ; (.+?) \\\n(?:    .*\n?)+", re.M)
PASSES = 5
"""An installed package may refuse a version that the image has, which takes another pass."""


def installed(name: str) -> str | None:
    """Returns the version of a package; ``None`` without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def satisfies(requirement: Requirement) -> bool:
    """Whether the installed version is in range; the suffix of an image's own build is ignored."""
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
    return [one for one in map(Requirement, lines) if one.name != name]


def misfits(pins: dict[str, str], direct: list[Requirement]) -> Iterator[str]:
    """Yields packages of the lock that are missing, out of range, or refused by another one."""
    extras = {canonicalize_name(one.name): one.extras or {""} for one in direct}
    yield from (name for name in pins if installed(name) is None)
    yield from (canonicalize_name(one.name) for one in direct if not satisfies(one))
    for name in pins:
        lines = metadata.requires(name) or [] if installed(name) else []
        for required in map(Requirement, lines):
            dependency, marker = canonicalize_name(required.name), required.marker
            applies = marker is None or any(
                marker.evaluate({"extra": extra}) for extra in extras.get(name, {""})
            )
            if applies and dependency in pins and not satisfies(required):
                # At the lock's version, so the image's version of the other package is at fault.
                is_locked = installed(dependency) == pins[dependency]
                yield name if is_locked else dependency


def main(lock: Path, command: list[str], exact: bool) -> None:
    """Installs until everything fits, and prints what differs from the lock."""
    entries = {
        canonicalize_name(match[1]): match
        for match in PIN.finditer(lock.read_text(encoding="utf-8"))
        if Marker(match[3]).evaluate()
    }
    pins = {name: match[2] for name, match in entries.items()}
    direct = direct_requirements(lock.resolve().parent.parent / "pyproject.toml")
    before = {name: installed(name) for name in pins}
    for _ in range(PASSES):
        importlib.invalidate_caches()
        wrong = {n for n in pins if installed(n) != pins[n]}
        if not exact:
            wrong &= set(misfits(pins, direct))
        if not wrong:
            break
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("".join(entries[name][0] for name in sorted(wrong)))
            file.flush()
            subprocess.run([*command, file.name], check=True)
    else:
        listed = ", ".join(f"{n} {installed(n)} instead of {pins[n]}" for n in sorted(wrong))
        sys.exit(f"error: installed are {listed}\n  fix: remove the environment and install again")
    if not exact:
        print(f"{'package':32} {'image':24} {'lock':16}")
        for name, version in before.items():
            if version != pins[name]:
                now = "kept" if installed(name) == version else "installed"
                print(f"{name:32} {version or '-':24} {pins[name]:16} {now}")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--exact"]
    main(Path(words[0]), words[1:], exact=len(words) < len(sys.argv) - 1)
