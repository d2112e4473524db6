"""``python -m launch.reference.lock [PACKAGE …]``: locks every dependency, with hashes.

For Linux, and the Pythons that pyproject.toml allows, in ``requirements``: ``stack.txt`` is what
stages and launcher need, also in the image, ``dev.txt`` the rest, and ``torch.txt`` PyPI's build of
torch with the CUDA libraries that only it needs. A version stays as it was locked while the ranges
allow it, but for packages that are named, which become the newest. Of each version the wheels for
CPython on x86-64 and aarch64 are accepted, and its source only where there is none.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from recipes.core.files import REPO_ROOT, write_text_atomically

LOCKS = REPO_ROOT / "requirements"
PIN = re.compile(r"^([\w.-]+)==(\S+)(?: ; (.+?))?(?: \\)?$", re.M)
"""Name, version and marker."""
PYTHONS = {11: ("3.11.0", "3.11.99"), 12: ("3.12.0", "3.12.99")}
"""By minor version, the first and the last of each, between which a marker may change."""
MACHINES = ("x86_64", "aarch64")
TORCH = {"torch", "torchvision"}
CUDA = re.compile(r"nvidia-|cuda-|triton")
OF_THE_CONTAINER = {*TORCH, "triton", "cuda-bindings", "transformer-engine"}
"""What an NGC image brings itself, and must keep."""


def direct(*extras: str) -> list[Requirement]:
    """The dependencies that pyproject.toml states, and those of extras of it."""
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras for line in optional[name])]
    return [Requirement(line) for line in lines if not line.startswith(project["name"])]


def locked(python: str, *names: str) -> dict[str, str]:
    """Versions that some of the files install for a Python."""
    return {
        name: version
        for file in names
        for name, version, marker in PIN.findall((LOCKS / file).read_text(encoding="utf-8"))
        if not marker or Marker(marker).evaluate(environment(python))
    }


def main() -> None:
    """Writes the three files."""
    with tempfile.TemporaryDirectory() as folder:
        pins, found = Path(folder, "pins.txt"), Path(folder, "pylock.toml")
        before = (file.read_text(encoding="utf-8") for file in sorted(LOCKS.glob("*.txt")))
        pins.write_text("".join(before), encoding="utf-8")  # which is what uv prefers
        upgraded = [option for name in sys.argv[1:] for option in ("--upgrade-package", name)]
        _uv("pyproject.toml", "--extra=dev", "--annotation-style=line", "-o", pins, *upgraded)
        parents = dict(_parents(pins.read_text(encoding="utf-8")))
        _uv(pins, "--no-deps", "--format=pylock.toml", "-o", found)
        packages = tomllib.loads(found.read_text(encoding="utf-8"))["packages"]
    torch = _only_for_torch(parents)
    roots: set[str] = {canonicalize_name(one.name) for one in direct("tasks")}
    stack = _needed(roots - OF_THE_CONTAINER, parents)
    for name, chosen in {
        "stack.txt": stack,
        "dev.txt": set(parents) - torch - stack,
        "torch.txt": torch,
    }.items():
        lines = [_locked(one) for one in packages if one["name"] in chosen]
        write_text_atomically(LOCKS / name, "# python -m launch.reference.lock\n" + "".join(lines))


def _uv(*arguments: str | Path) -> None:
    uv, first = Path(sys.executable).with_name("uv"), PYTHONS[min(PYTHONS)][0]
    command = [str(uv), "pip", "compile", "--quiet", "--universal", "--python-version", first]
    subprocess.run([*command, *map(str, arguments)], cwd=REPO_ROOT, check=True)


def _parents(pins: str) -> Iterator[tuple[str, set[str]]]:
    """Each package, and those that need it."""
    for name, parents in re.findall(r"^([\w.-]+)==.*?# via (.+)$", pins, re.M):
        yield name, set(re.findall(r"[\w.-]+", re.sub(r"\([^)]*\)", "", parents)))


def _only_for_torch(parents: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    while more := {n for n, by in parents.items() if CUDA.match(n) and by <= TORCH | found} - found:
        found |= more
    return found | TORCH


def _needed(names: set[str], parents: Mapping[str, set[str]]) -> set[str]:
    """Names and all that they need, but for what a container brings and what only that needs."""
    found = set(names)
    while more := {n for n, by in parents.items() if by & found} - found - OF_THE_CONTAINER:
        found |= more
    return found


def _locked(package: Mapping[str, Any]) -> str:
    """Lines of a requirements file."""
    marker = f" ; {package['marker']}" if _sometimes(package.get("marker", "")) else ""
    hashes = "".join(f" \\\n    --hash=sha256:{one}" for one in _hashes(package))
    return f"{package['name']}=={package['version']}{marker}{hashes}\n"


def _sometimes(marker: str) -> bool:
    """Whether a marker is false for one of the Pythons and machines."""
    return bool(marker) and not all(
        Marker(marker).evaluate({**environment(python), "platform_machine": machine})
        for pythons in PYTHONS.values()
        for python in pythons
        for machine in MACHINES
    )


def environment(python: str) -> dict[str, str]:
    """What a marker asks of a Python, on Linux."""
    return {
        "python_full_version": python,
        "python_version": ".".join(python.split(".")[:2]),
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": MACHINES[0],
    }


def _hashes(package: Mapping[str, Any]) -> Iterable[str]:
    """Of the files that may be installed."""
    wheels = {minor: dict(_wheels(package, minor)) for minor in PYTHONS}
    if not all(wheels.values()):
        return [package["sdist"]["hashes"]["sha256"]]
    return sorted({one for found in wheels.values() for one in found.values()})


def _wheels(package: Mapping[str, Any], minor: int) -> Iterator[tuple[str, str]]:
    """Names and hashes of the wheels that fit a Python."""
    for wheel in package.get("wheels", ()):
        name = wheel["url"].rsplit("/", 1)[1]
        for tag in parse_wheel_filename(name.replace("%2B", "+"))[3]:
            linux = tag.platform.startswith(("manylinux", "linux"))
            place = tag.platform == "any" or (linux and tag.platform.endswith(MACHINES))
            older = re.fullmatch(r"cp3(\d+)-abi3", f"{tag.interpreter}-{tag.abi}")
            python = tag.interpreter in ("py3", f"py3{minor}") or (
                int(older[1]) <= minor
                if older
                else tag.interpreter == f"cp3{minor}" and tag.abi in ("none", tag.interpreter)
            )
            if place and python:
                yield name, wheel["hashes"]["sha256"]


if __name__ == "__main__":
    main()
