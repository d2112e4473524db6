"""The lock: within the ranges of pyproject.toml, complete, hashed, and installed here."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib.metadata import distribution, version

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch.reference.lock import LOCKS, OF_THE_CONTAINER, PYTHONS, direct, environment

LOCKED = re.compile(r"([\w.-]+)==(\S+)(?: ; (.+?))?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")
"""Name, version, marker and hashes."""
EDGES = [python for pythons in PYTHONS.values() for python in pythons]
ALL = ("stack.txt", "dev.txt", "torch.txt")


def locked(python: str, *names: str) -> dict[str, str]:
    """Versions that some files install for a Python, each once."""
    found = [
        (name, number)
        for file in names
        for name, number, marker, _ in LOCKED.findall((LOCKS / file).read_text())
        if not marker or Marker(marker).evaluate(environment(python))
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_accepted_without_a_hash(name: str) -> None:
    assert LOCKED.sub("", (LOCKS / name).read_text()) == "# python -m launch.reference.lock\n"


@pytest.mark.parametrize("python", EDGES)
def test_each_dependency_is_locked_within_its_range(python: str) -> None:
    found = locked(python, *ALL)
    wanted = direct("dev", "docs", "mlflow", "tasks", "wandb")
    assert [one for one in wanted if not fits(one, found)] == []


def fits(wanted: Requirement, found: dict[str, str]) -> bool:
    number = found.get(canonicalize_name(wanted.name), "")
    return bool(number) and wanted.specifier.contains(number, prereleases=True)


@pytest.mark.parametrize("python", EDGES)
def test_what_these_need_is_locked_too(python: str) -> None:
    """As the packages say that are installed here; those of CUDA are not, on a CPU."""
    found = locked(python, *ALL)
    roots = {canonicalize_name(d.name): d.extras for d in direct("dev", "docs", "mlflow", "tasks")}
    names = set(locked(python, "stack.txt", "dev.txt")) | {"torch", "torchvision"}
    missing = [
        f"{name}: {one}"
        for name in sorted(names)
        for one in needs(name, roots.get(name, set()), environment(python))
        if not fits(one, found)
    ]
    assert missing == []


def needs(name: str, extras: set[str], where: dict[str, str]) -> Iterator[Requirement]:
    for text in distribution(name).requires or ():
        one = Requirement(text)
        given = ({**where, "extra": extra} for extra in ("", *extras))
        if one.marker is None or any(one.marker.evaluate(each) for each in given):
            yield one


def test_the_image_keeps_what_its_container_brings() -> None:
    found = locked(EDGES[-1], "stack.txt")
    assert [n for n in found if n in OF_THE_CONTAINER or re.match(r"nvidia-(cu|nc|nv)", n)] == []
    wanted = [d for d in direct("tasks") if canonicalize_name(d.name) not in OF_THE_CONTAINER]
    assert [one for one in wanted if not fits(one, found)] == []


def test_the_tests_run_with_what_is_locked() -> None:
    found = locked(platform.python_version(), "stack.txt", "dev.txt")
    assert {name: version(name) for name in found} == found
