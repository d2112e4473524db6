"""The image's pins are a solution of the dependencies' bounds for the image's Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from recipes.core.files import REPO_ROOT
from tests.unit.test_image import OF_THE_CONTAINER, PINS


def test_pins_of_the_image_resolve_for_its_python() -> None:
    """As a resolver finds it for Python 3.12 and glibc 2.39; nothing is installed."""
    never = "".join(f'{name}; python_version < "3"\n' for name in sorted(OF_THE_CONTAINER))
    command = [Path(sys.executable).with_name("uv"), "pip", "compile", "pyproject.toml"]
    command += ["--extra", "tasks"]
    command += ["--override", "-", "--constraint", PINS, "--no-annotate", "--no-header", "--quiet"]
    command += ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_39"]
    done = subprocess.run(
        command, cwd=REPO_ROOT, input=never, capture_output=True, text=True, check=False
    )
    hint = f"pyproject.toml changed? The head of {PINS} says how to make the pins again."
    assert done.returncode == 0, f"{done.stderr}\n{hint}"
    resolved = [line for line in done.stdout.splitlines() if "==" in line]
    recorded = [line for line in PINS.read_text().splitlines() if not line.startswith("#")]
    assert sorted(resolved) == sorted(recorded), hint
