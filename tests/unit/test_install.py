"""``install.sh`` in an environment that looks like an NGC container."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.core.files import REPO_ROOT

NEEDED = ("packaging", "setuptools", "einops")
"""The packages of the lock that are installed here: a few, not gigabytes."""

IMPORTED = ("megatron.core", "modelopt.torch", "nemo.collections.llm", "transformer_engine.pytorch")


def add_metadata(image: Path, name: str, version: str, requires: str = "") -> None:
    """Makes a package that importlib.metadata finds."""
    info = image / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The script with a short lock, beside an image's site-packages."""
    copy = tmp_path / "checkout"
    (copy / "requirements").mkdir(parents=True)
    shutil.copy(REPO_ROOT / "install.sh", copy)
    shutil.copy(REPO_ROOT / "requirements" / "install_missing.py", copy / "requirements")
    (copy / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "few"\nversion = "1"\n[project.optional-dependencies]\n'
        'dev = ["einops<1", "packaging>=24"]\n[tool.setuptools]\npackages = []\n'
    )
    lock = (REPO_ROOT / "requirements" / "dev.txt").read_text()
    entries = re.findall(r"^[\w.-]+==.*\n(?:    .*\n)+", lock, re.M)
    few = [entry for entry in entries if entry.partition("==")[0] in NEEDED]
    assert len(few) == len(NEEDED)
    (copy / "requirements" / "dev.txt").write_text("".join(few))
    image = tmp_path / "image"
    for name, version, requires in (
        ("torch", "2.9.0a0+50eac811a6.nv25.09", ""),
        ("broken", "1.0", "Requires-Dist: not-installed\n"),
    ):
        (image / name).mkdir(parents=True)
        (image / name / "__init__.py").write_text("class version:\n    cuda = '13.0'\n")
        add_metadata(image, name, version, requires)
    for module in IMPORTED:
        package = image.joinpath(*module.split("."))
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (tmp_path / "constraint.txt").write_text("packaging==1.0\nsetuptools==1.0\n")
    return copy


def install(copy: Path) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "VENV": str(copy / "venv"),
        "PYTHONPATH": str(copy.parent / "image"),
        "PIP_CONSTRAINT": str(copy.parent / "constraint.txt"),
        "LC_ALL": "C",
        "HOME": "/nonexistent",
    }
    done = subprocess.run(
        ["bash", "install.sh"], cwd=copy, env=env, capture_output=True, text=True, check=False
    )
    if "(from versions: none)" in done.stderr:
        pytest.skip("no package index can be reached")
    return done


def test_the_image_keeps_its_torch_and_its_other_faults(copy: Path) -> None:
    done = install(copy)
    assert done.returncode == 0, done.stderr
    assert "include-system-site-packages = true" in (copy / "venv" / "pyvenv.cfg").read_text()
    assert not list((copy / "venv").rglob("torch"))
    assert install(copy).stdout == ""


def test_packages_of_the_image_stay_if_they_fit(copy: Path) -> None:
    """The range of the project includes einops 0.1."""
    image = copy.parent / "image"
    add_metadata(image, "einops", "0.1")
    done = install(copy)
    assert done.returncode == 0, done.stderr
    assert not list((copy / "venv").rglob("einops"))
    assert re.search(r"^einops +0\.1 +0\.\S+ +kept$", done.stdout, re.M), done.stdout
    assert re.search(r"^setuptools +\S+ +\S+ +installed$", done.stdout, re.M), done.stdout


def test_a_version_out_of_range_that_cannot_be_replaced_is_named(copy: Path) -> None:
    """``PYTHONPATH`` precedes the virtual environment."""
    add_metadata(copy.parent / "image", "einops", "2.0")
    done = install(copy)
    assert done.returncode != 0
    assert "einops 2.0 instead of" in done.stderr
    assert not (copy / "venv" / ".installed").exists()


@pytest.mark.parametrize("module", IMPORTED)
def test_a_library_that_cannot_be_imported_fails(copy: Path, module: str) -> None:
    shutil.rmtree(copy.parent.joinpath("image", *module.split(".")))
    done = install(copy)
    assert done.returncode != 0
    assert module in done.stderr
    assert not (copy / "venv" / ".installed").exists()
