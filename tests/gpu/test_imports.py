"""Everything imports on this machine, whatever else is installed on it."""

from __future__ import annotations

import importlib
import platform
from pathlib import Path

from recipes.core.files import REPO_ROOT
from recipes.core.versions import git_sha, pins
from tests.gpu.small import record


def test_every_module_imports(results: Path) -> None:
    imported = []
    for root in ("nemo_convert", "recipes", "launch"):
        for file in sorted((REPO_ROOT / root).rglob("*.py")):
            name = ".".join(file.relative_to(REPO_ROOT).with_suffix("").parts)
            if not name.endswith(("__init__", "__main__")):
                importlib.import_module(name)
                imported.append(name)
    record(
        results,
        "versions",
        modules=len(imported),
        machine=platform.machine(),
        commit=git_sha(),
        versions={pin.name: pin.installed for pin in pins()},
    )
