"""``install.sh`` and the steps of the Dockerfile in environments that look like NGC images."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pip
import pytest

from recipes.core.files import REPO_ROOT
from tests.support.installing import require_package_index

INSTALLED = ("packaging", "setuptools", "einops")
"""Packages that these tests install. All packages of the lock file would take gigabytes."""

TORCH = "2.9.0a0+50eac811a6.nv25.09"
"""Version of the image's torch."""
IMPORTED = ("megatron.core", "modelopt.torch", "nemo.collections.llm", "transformer_engine.pytorch")
"""Modules that ``install.sh`` imports at its end, if the image has torch with CUDA."""
ENGINE_IMPORTED = ("lm_eval.models.huggingface", "lm_eval.models.openai_completions")
"""Modules that the build of the image for engines imports at its end."""
STUBS = (*IMPORTED, *ENGINE_IMPORTED, "hydra", "omegaconf")


def add_metadata(packages: Path, name: str, version: str, requires: str = "") -> None:
    """Makes a package that importlib.metadata finds."""
    info = packages / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    )


@dataclass(frozen=True)
class Image:
    """An environment that looks like an NGC image, and a checkout with a short lock file."""

    checkout: Path
    python: Path
    packages: Path
    """Folder of the Python's packages."""

    @property
    def env(self) -> dict[str, str]:
        """Environment of a container. A constraint file pins versions that the lock does not have.

        Nobody can make the home directory, not even root.
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
    """Makes an image with torch, the modules in ``STUBS``, and a package that lacks another one."""
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
    (tmp_path / "constraint.txt").write_text("packaging==1.0\nsetuptools==1.0\n")
    python, packages = make_python(tmp_path / "base")
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
    """Makes a Python with only pip; returns it and the folder of its packages.

    This is a copy of the interpreter beside links to its standard library. A virtual environment
    would not do, since another one that is made from it does not see its packages.
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
    folder = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    packages = Path(folder.stdout.strip())
    packages.mkdir(parents=True, exist_ok=True)
    (packages / "pip").symlink_to(Path(pip.__file__).parent)
    return python, packages


def install(image: Image, **env: str) -> subprocess.CompletedProcess[str]:
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


def test_torch_of_the_image_is_kept_and_broken_packages_are_ignored(image: Image) -> None:
    done = install(image)
    assert done.returncode == 0, done.stderr
    venv = image.checkout / "venv"
    assert "include-system-site-packages = true" in (venv / "pyvenv.cfg").read_text()
    assert not list(venv.rglob("torch"))
    assert install(image).stdout == "", "a second installation has nothing to do"


def test_packages_of_the_image_within_the_range_are_kept(image: Image) -> None:
    """The image has einops 0.1, and the project requires einops<1."""
    add_metadata(image.packages, "einops", "0.1")
    done = install(image)
    assert done.returncode == 0, done.stderr
    assert not list((image.checkout / "venv").rglob("einops"))
    assert re.search(r"^einops +0\.1 +0\.\S+ +kept$", done.stdout, re.M), done.stdout
    assert re.search(r"^setuptools +\S+ +\S+ +installed$", done.stdout, re.M), done.stdout


def test_packages_of_the_image_out_of_range_are_replaced(image: Image) -> None:
    add_metadata(image.packages, "einops", "2.0")
    done = install(image)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^einops +2\.0 +0\.\S+ +installed$", done.stdout, re.M), done.stdout


def test_a_version_out_of_range_that_cannot_be_replaced_is_named(
    image: Image, tmp_path: Path
) -> None:
    """A package on ``PYTHONPATH`` precedes the virtual environment."""
    add_metadata(tmp_path / "path", "einops", "2.0")
    done = install(image, PYTHONPATH=str(tmp_path / "path"))
    assert done.returncode != 0
    assert "einops 2.0 instead of" in done.stderr
    assert not (image.checkout / "venv" / ".installed").exists()


@pytest.mark.parametrize("module", IMPORTED)
def test_installation_fails_if_a_library_cannot_be_imported(image: Image, module: str) -> None:
    shutil.rmtree(image.packages.joinpath(*module.split(".")))
    done = install(image)
    assert done.returncode != 0
    assert module in done.stderr
    assert not (image.checkout / "venv" / ".installed").exists()


def build(target: str, image: Image, *changes: tuple[str, str]) -> int:
    """Runs both RUNs of a target of the Dockerfile, with the image's Python and real uv."""
    stage = re.split(r"^FROM ", (REPO_ROOT / "Dockerfile").read_text(), flags=re.M)
    (text,) = (part for part in stage if part.partition("\n")[0].endswith(f" AS {target}"))
    steps = re.findall(r"^RUN (?:--mount=\S+ \\\n)?((?:.*\\\n)*.*)$", text, re.M)
    no_user = " \\\n && useradd --create-home --uid 10001 recipes"
    for old, new in ((no_user, ""), ("/opt/nemo-recipes", str(image.checkout)), *changes):
        assert old in steps[0]
        steps[0] = steps[0].replace(old, new)
    steps[1] = steps[1].replace("(3, 12)", str(sys.version_info[:2]))
    env = image.env
    env["PATH"] += f":{Path(sys.executable).parent}"  # this folder has uv
    for script in steps:
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
    subprocess.run([image.python, "-c", "import packaging"], check=True)
    assert (image.packages / f"torch-{TORCH}.dist-info").is_dir()


def test_a_build_fails_if_it_replaces_a_package_that_must_stay(image: Image) -> None:
    """The image's einops is out of range. Here it must stay, as torch must in the Dockerfile."""
    add_metadata(image.packages, "einops", "2.0")
    assert build("recipes", image, ('"torch"', '"einops"')) != 0
    assert list(image.packages.glob("einops-0.*")), "the pinned version was installed"


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
