"""What is locked, under which licences: a page; and, run as a module, an SBOM (CycloneDX)."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch.reference.configuration import table
from launch.reference.lock import PYTHONS, environment, locked

PYTHON = PYTHONS[max(PYTHONS)][-1]
"""Whose versions are shown; they differ by less than a handful from the other's."""
SPDX = {
    "Apache 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD": "BSD License",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "The MIT License (MIT)": "MIT",
}
"""Other names of the same licence."""


def dependencies() -> Iterator[str]:
    """The parts of the page."""
    for name, about in {"stack.txt": "What runs", "dev.txt": "For tests and documents"}.items():
        by_licence = defaultdict(list)
        for package, version in locked(PYTHON, name).items():
            by_licence[licence(distribution(package))].append(f"{package} {version}")
        rows = sorted(by_licence.items(), key=lambda row: (-len(row[1]), row[0]))
        yield f"## {about}\n"
        yield table(("licence", "packages"), ((one, ", ".join(names)) for one, names in rows))
    yield "## PyTorch, and what PyPI's build of it brings\n"
    yield ", ".join(f"{n} {version}" for n, version in locked(PYTHON, "torch.txt").items()) + ".\n"


def licence(package: Distribution) -> str:
    """What its metadata says: the expression, or else its classifiers, or else a line of text."""
    classifiers = (one.split(" :: ") for one in _said(package, "Classifier"))
    named = [parts[-1] for parts in classifiers if parts[0] == "License" and len(parts) > 1]
    named = [one for one in named if one != "OSI Approved"]
    text = " ".join(_said(package, "License")).strip() or "not stated"
    found = _said(package, "License-Expression") or named or text.splitlines()[:1]
    return ", ".join(SPDX.get(one, one) for one in found)


def _said(package: Distribution, key: str) -> list[str]:
    return package.metadata.get_all(key) or []


def sbom() -> dict[str, Any]:
    """What is installed here of what is locked, and of that, what needs what."""
    found = {}
    for name in locked(PYTHON, "stack.txt", "dev.txt", "torch.txt"):
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # CUDA's libraries, with a build of torch that needs none
    purls = {name: f"pkg:pypi/{name}@{package.version}" for name, package in found.items()}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "components": [
            {
                "type": "library",
                "bom-ref": purls[name],
                "name": name,
                "version": package.version,
                "licenses": [{"license": {"name": licence(package)}}],
                "purl": purls[name],
            }
            for name, package in found.items()
        ],
        "dependencies": [
            {"ref": purls[name], "dependsOn": sorted({purls[n] for n in _needs(p) if n in purls})}
            for name, p in found.items()
        ],
    }


def _needs(package: Distribution) -> Iterator[str]:
    for one in map(Requirement, package.requires or ()):
        if one.marker is None or one.marker.evaluate({**environment(PYTHON), "extra": ""}):
            yield canonicalize_name(one.name)


if __name__ == "__main__":
    json.dump(sbom(), sys.stdout, indent=1)
