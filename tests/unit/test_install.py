"""Tests ``install.sh`` and the Dockerfile's RUN instructions with a Python like an NGC image's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import pip
import pytest

from recipes.core.files import REPO_ROOT
from tests.support.installing import require_package_index

LOCKED = ("packaging", "setuptools", "einops")
"""Packages of the tests' short lock files. All packages of the real ones would take gigabytes."""

TORCH = "2.9.0a0+50eac811a6.nv25.09"
"""Version of the image's torch: NVIDIA's own build, which is on no package index."""
IMPORTED = ("megatron.core", "modelopt.torch", "nemo.collections.llm", "transformer_engine.pytorch")
"""Modules that ``install.sh`` imports at its end, if the image has torch with CUDA."""
ENGINE_IMPORTED = ("lm_eval.models.huggingface", "lm_eval.models.openai_completions")
"""Modules that the build of the image for engines imports at its end."""
STUBS = (*IMPORTED, *ENGINE_IMPORTED, "hydra", "omegaconf")
"""Modules that are empty in the test image."""


def add_metadata(packages: Path, name: str, version: str, requires: str = "") -> None:
    """Makes importlib.metadata find a package, without any module of it.

    Args:
        packages: Folder of installed packages.
        name: Name of the package.
        version: Version of the package.
        requires: Further lines of the metadata, such as ``Requires-Dist: NAME``.
    """
    info = packages / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    )


@dataclass(frozen=True)
class Image:
    """A Python with packages like those of an NGC image, and a checkout with short lock files."""

    checkout: Path
    python: Path
    packages: Path
    """Folder in which ``python`` installs packages."""

    @property
    def env(self) -> dict[str, str]:
        """Environment variables of a container.

        As in an NGC container, pip's constraint file pins versions other than those of the lock.
        ``HOME`` cannot be created, not even by root, because ``/dev/null`` is not a directory.
        """
        return {
            **os.environ,
            "PATH": f"{self.python.parent}:{os.environ['PATH']}",
            "PIP_CONSTRAINT": str(self.checkout.parent / "constraint.txt"),
            "LC_ALL": "C",
            "HOME": "/dev/null/home",
        }


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """An image with torch, the modules in ``STUBS``, and a package whose dependency is missing."""
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
    short_lock = [entry for entry in entries if entry.partition("==")[0] in LOCKED]
    assert len(short_lock) == len(LOCKED)
    for name in ("dev", "stack", "engine"):
        (checkout / "requirements" / f"{name}.txt").write_text("".join(short_lock))
    (tmp_path / "constraint.txt").write_text("packaging==1.0\nsetuptools==1.0\n")
    python, packages = make_python(tmp_path / "base")
    # ``broken`` requires a package that is not installed.
    for name, version, requires in (
        ("torch", TORCH, ""),
        ("broken", "1.0", "Requires-Dist: not-installed\n"),
        ("transformer_engine", "2.9", ""),
        ("tensorrt_llm", "1.2.0", ""),
        ("transformers", "4.56.0", ""),
    ):
        add_metadata(packages, name, version, requires)
    for module in ("torch", *STUBS):
        packages.joinpath(*module.split(".")).mkdir(parents=True)
        packages.joinpath(*module.split("."), "__init__.py").touch()
    (packages / "torch" / "__init__.py").write_text("class version:\n    cuda = '13.0'\n")
    return Image(checkout, python, packages)


def make_python(root: Path) -> tuple[Path, Path]:
    """Makes a Python with only pip; returns the interpreter and the folder of its packages.

    The Python is a copy of this interpreter with links to the standard library. It cannot be a
    virtual environment: ``install.sh`` makes another virtual environment from this Python, and that
    one would not see the packages of the first.
    """
    source, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    python = root / "bin" / "python"
    python.parent.mkdir(parents=True)
    shutil.copy(source, python)
    (root / "lib" / library.name).mkdir(parents=True)
    for file in library.iterdir():
        if file.name not in ("site-packages", "dist-packages"):
            (root / "lib" / library.name / file.name).symlink_to(file)
    for file in library.parent.glob("libpython*"):
        (root / "lib" / file.name).symlink_to(file)
    code = "import site; print(site.getsitepackages()[0])"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    packages = Path(done.stdout.strip())
    packages.mkdir(parents=True, exist_ok=True)
    (packages / "pip").symlink_to(Path(pip.__file__).parent)
    return python, packages


def install(image: Image, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs ``install.sh`` with the image's Python; skips the test without a package index."""
    variables = {"PYTHON": str(image.python), "VENV": str(image.checkout / "venv"), **env}
    done = subprocess.run(
        ["bash", "install.sh"],
        cwd=image.checkout,
        env={**image.env, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    require_package_index(done)
    return done


def test_packages_of_the_image_are_kept_unless_they_are_out_of_range(image: Image) -> None:
    """The project requires einops<1 and packaging>=24.

    ``install.sh`` prints a row per package: name, version in the image, locked version, and action.
    The missing dependency of the image's package ``broken`` is not an error.
    """
    add_metadata(image.packages, "einops", "0.1")
    add_metadata(image.packages, "packaging", "20.0")
    done = install(image)
    assert done.returncode == 0, done.stderr
    venv = image.checkout / "venv"
    assert "include-system-site-packages = true" in (venv / "pyvenv.cfg").read_text()
    assert not [*venv.rglob("torch"), *venv.rglob("einops")]
    for row in (r"einops +0\.1 +0\.\S+ +kept", r"packaging +20\.0 +\S+ +installed",
                r"setuptools +\S+ +\S+ +installed"):  # fmt: skip
        assert re.search(rf"^{row}$", done.stdout, re.M), done.stdout
    assert install(image).stdout == ""  # a second installation has nothing to do


def test_packages_of_an_image_in_a_virtual_environment_are_found(image: Image) -> None:
    """NGC's image of NeMo has PyTorch in the base Python, and NeMo in a virtual environment."""
    environment = image.checkout.parent / "opt-venv"
    command = [image.python, "-m", "venv", "--system-site-packages", "--without-pip", environment]
    subprocess.run(command, check=True)
    [packages] = environment.glob("lib/python*/site-packages")
    for name in ("megatron", "nemo", "modelopt", "transformer_engine"):
        (image.packages / name).rename(packages / name)
    done = install(replace(image, python=environment / "bin" / "python"))
    assert done.returncode == 0, done.stderr  # it imports them at its end


def test_a_version_out_of_range_that_cannot_be_replaced_is_named(
    image: Image, tmp_path: Path
) -> None:
    """Python finds the einops 2.0 on ``PYTHONPATH`` before the one in the virtual environment."""
    add_metadata(tmp_path / "path", "einops", "2.0")
    done = install(image, PYTHONPATH=str(tmp_path / "path"))
    assert done.returncode != 0
    assert "einops 2.0 instead of" in done.stderr
    assert not (image.checkout / "venv" / ".installed").exists()


def test_installation_fails_if_a_library_cannot_be_imported(image: Image) -> None:
    for module in IMPORTED:
        folder = image.packages.joinpath(*module.split("."))
        removed = folder.rename(image.checkout / "removed")
        done = install(image)
        assert done.returncode != 0
        assert module in done.stderr
        assert not (image.checkout / "venv" / ".installed").exists()
        removed.rename(folder)


def build(target: str, image: Image, *changes: tuple[str, str]) -> int:
    """Runs both RUN instructions of a target of the Dockerfile in this machine's shell.

    Args:
        target: ``engine`` or ``recipes``.
        image: Environment whose Python replaces that of the base image.
        changes: Texts of the first instruction, each with its replacement.

    Returns:
        The exit status of the first instruction that fails, otherwise 0.
    """
    sections = re.split(r"^FROM ", (REPO_ROOT / "Dockerfile").read_text(), flags=re.M)
    [section] = [text for text in sections if text.partition("\n")[0].endswith(f" AS {target}")]
    # A RUN instruction without its mount of uv. It ends with the first line without a backslash.
    scripts = re.findall(r"^RUN (?:--mount=\S+ \\\n)?((?:.*\\\n)*.*)$", section, re.M)
    add_user = " \\\n && useradd --create-home --uid 10001 recipes"
    for old, new in ((add_user, ""), ("/opt/nemo-recipes", str(image.checkout)), *changes):
        assert old in scripts[0]
        scripts[0] = scripts[0].replace(old, new)
    # The target ``recipes`` checks the version of the base image's Python.
    scripts[1] = scripts[1].replace("(3, 12)", str(sys.version_info[:2]))
    env = image.env
    env["PATH"] += f":{Path(sys.executable).parent}"  # this folder has uv
    for script in scripts:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", script],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        require_package_index(done)
        print(done.stdout, done.stderr)
        if done.returncode != 0:
            return done.returncode
    return 0


@pytest.mark.parametrize("target", ["engine", "recipes"])
def test_a_build_installs_what_the_image_lacks(
    target: str, image: Image, capsys: pytest.CaptureFixture[str]
) -> None:
    add_metadata(image.packages, "einops", "0.1")
    assert build(target, image) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^einops +0\.1 +0\.\S+ +kept$", printed, re.M), printed
    assert re.search(r"^packaging +- +\S+ +installed$", printed, re.M), printed
    # Packages are installed into the image's Python itself, not into a virtual environment.
    subprocess.run([image.python, "-c", "import packaging"], check=True)
    assert (image.packages / f"torch-{TORCH}.dist-info").is_dir()


def test_a_build_fails_if_it_replaces_a_package_that_must_stay(image: Image) -> None:
    """The build compares torch before and after the installation; here it compares einops instead.

    The image's einops is out of range, so the pinned version replaces it.
    """
    add_metadata(image.packages, "einops", "2.0")
    assert build("recipes", image, ('"torch"', '"einops"')) != 0
    assert list(image.packages.glob("einops-0.*"))  # the pinned version


@pytest.mark.parametrize(
    ("target", "module"),
    [("engine", ENGINE_IMPORTED[0]), ("recipes", "transformer_engine.pytorch")],
)
def test_a_build_fails_if_a_library_cannot_be_imported(
    target: str, module: str, image: Image, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(image.packages.joinpath(*module.split(".")))
    assert build(target, image) != 0
    assert f"No module named '{module}'" in capsys.readouterr().out
