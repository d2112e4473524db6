"""A newer transformers than the stack's, for users of exported models."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from recipes.core.files import sha256_of
from recipes.core.wheels import cache_dir

PINS = Path(__file__).with_name("transformers_5.txt")
"""Pins of it and of its dependencies that the stack lacks or has in older versions."""


def transformers_5() -> Path:
    """Returns a folder with these packages, installed once into the cache."""
    folder = cache_dir() / "tests" / sha256_of(PINS)[:16]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-compile", "--require-hashes", "--requirement", str(PINS)]
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        target = Path(temporary) / "packages"
        done = subprocess.run(
            [*command, *options, "--target", str(target)],
            capture_output=True,
            text=True,
            check=False,
        )
        if "(from versions: none)" in done.stderr:
            pytest.skip("no index of packages can be reached")
        assert done.returncode == 0, done.stderr
        target.rename(folder)
    return folder
