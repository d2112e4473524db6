"""``install.sh`` and the steps of the Dockerfile in environments that look like NGC images."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.core.files import REPO_ROOT
from tests.support.installing import require_package_index

INSTALLED = ("packaging", "setuptools", "einops")
"""Packages that these tests install. All packages of the lock file would take gigabytes."""

IMPORTED = ("megatron.core", "modelopt.torch", "nemo.collections.llm", "transformer_engine.pytorch")
"""Modules that ``install.sh`` imports at its end, if the image has torch with CUDA."""


def add_metadata(image: Path, name: str, version: str, requires: str = "") -> None:
    """Makes a package that importlib.metadata finds."""
    info = image / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Makes a checkout with a short lock file, and beside it the site-packages of an image.

    The image has torch, the modules in ``IMPORTED``, and a package with a missing requirement. A
    constraint file, as in an NGC container, pins versions that the lock file does not have.
    """
    checkout = tmp_path / "checkout"
    (checkout / "requirements").mkdir(parents=True)
    shutil.copy(REPO_ROOT / "install.sh", checkout)
    shutil.copy(REPO_ROOT / "requirements" / "install_missing.py", checkout / "requirements")
    (checkout / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "few"\nversion = "1"\n[project.optional-dependencies]\n'
        'dev = ["einops<1", "packaging>=24"]\n[tool.setuptools]\npackages = []\n'
    )
    lock = (REPO_ROOT / "requirements" / "dev.txt").read_text()
    entries = re.findall(r"^[\w.-]+==.*\n(?:    .*\n)+", lock, re.M)
    short_lock = [entry for entry in entries if entry.partition("==")[0] in INSTALLED]
    assert len(short_lock) == len(INSTALLED)
    for name in ("dev", "stack", "engine"):
        (checkout / "requirements" / f"{name}.txt").write_text("".join(short_lock))
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
    return checkout


def install(checkout: Path) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "VENV": str(checkout / "venv"),
        "PYTHONPATH": str(checkout.parent / "image"),
        "PIP_CONSTRAINT": str(checkout.parent / "constraint.txt"),
        "LC_ALL": "C",
        "HOME": "/nonexistent",
    }
    done = subprocess.run(
        ["bash", "install.sh"], cwd=checkout, env=env, capture_output=True, text=True, check=False
    )
    require_package_index(done)
    return done


def test_torch_of_the_image_is_kept_and_broken_packages_are_ignored(checkout: Path) -> None:
    done = install(checkout)
    assert done.returncode == 0, done.stderr
    assert "include-system-site-packages = true" in (checkout / "venv" / "pyvenv.cfg").read_text()
    assert not list((checkout / "venv").rglob("torch"))
    assert install(checkout).stdout == "", "a second installation has nothing to do"


def test_packages_of_the_image_within_the_range_are_kept(checkout: Path) -> None:
    """The image has einops 0.1, and the project requires einops<1."""
    image = checkout.parent / "image"
    add_metadata(image, "einops", "0.1")
    done = install(checkout)
    assert done.returncode == 0, done.stderr
    assert not list((checkout / "venv").rglob("einops"))
    assert re.search(r"^einops +0\.1 +0\.\S+ +kept$", done.stdout, re.M), done.stdout
    assert re.search(r"^setuptools +\S+ +\S+ +installed$", done.stdout, re.M), done.stdout


def test_a_version_out_of_range_that_cannot_be_replaced_is_named(checkout: Path) -> None:
    """The image's package is on ``PYTHONPATH``, which precedes the virtual environment."""
    add_metadata(checkout.parent / "image", "einops", "2.0")
    done = install(checkout)
    assert done.returncode != 0
    assert "einops 2.0 instead of" in done.stderr
    assert not (checkout / "venv" / ".installed").exists()


@pytest.mark.parametrize("module", IMPORTED)
def test_installation_fails_if_a_library_cannot_be_imported(checkout: Path, module: str) -> None:
    shutil.rmtree(checkout.parent.joinpath("image", *module.split(".")))
    done = install(checkout)
    assert done.returncode != 0
    assert module in done.stderr
    assert not (checkout / "venv" / ".installed").exists()


@pytest.fixture
def image_python(checkout: Path) -> Path:
    """Makes the Python of a base image, as a virtual environment with pip."""
    python = checkout.parent / "base" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    (packages,) = python.parents[1].glob("lib/*/site-packages")
    for name, version in (
        ("torch", "2.9.0a0"),
        ("transformer_engine", "2.9"),
        ("tensorrt_llm", "1.2.0"),
        ("transformers", "4.56.0"),
    ):
        add_metadata(packages, name, version)
    return python


def build(target: str, checkout: Path, python: Path, *changes: tuple[str, str]) -> int:
    """Runs the first RUN of a target of the Dockerfile, with the image's Python and real uv."""
    stage = re.split(r"^FROM ", (REPO_ROOT / "Dockerfile").read_text(), flags=re.M)
    (text,) = (part for part in stage if part.partition("\n")[0].endswith(f" AS {target}"))
    step = re.search(r"^RUN --mount=\S+ \\\n((?:.*\\\n)*.*)$", text, re.M)
    assert step
    script, no_user = step[1], " \\\n && useradd --create-home --uid 10001 recipes"
    for old, new in ((no_user, ""), ("/opt/nemo-recipes", str(checkout)), *changes):
        assert old in script
        script = script.replace(old, new)
    path = (
        f"{python.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"  # the latter has uv
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    require_package_index(done)
    print(done.stdout, done.stderr)
    return done.returncode


@pytest.mark.parametrize("target", ["engine", "recipes"])
def test_a_build_installs_what_the_image_lacks(
    target: str, checkout: Path, image_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packages,) = image_python.parents[1].glob("lib/*/site-packages")
    add_metadata(packages, "einops", "0.1")
    assert build(target, checkout, image_python) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^einops +0\.1 +0\.\S+ +kept$", printed, re.M), printed
    assert re.search(r"^packaging +- +\S+ +installed$", printed, re.M), printed
    subprocess.run([image_python, "-c", "import packaging"], check=True)
    assert (packages / "torch-2.9.0a0.dist-info").is_dir()


def test_a_build_fails_if_it_replaces_a_package_that_must_stay(
    checkout: Path, image_python: Path
) -> None:
    """The image's einops is out of range. Here it must stay, as torch must in the Dockerfile."""
    (packages,) = image_python.parents[1].glob("lib/*/site-packages")
    add_metadata(packages, "einops", "2.0")
    assert build("recipes", checkout, image_python, ('"torch"', '"einops"')) != 0
    assert list(packages.glob("einops-0.*")), "the pinned version was installed"
