"""Copies this repository's code into a run directory. Stages run this copy, called a snapshot.

The launcher reads the code once and uses the same bytes for fingerprints and for the snapshot. So
stages run the code that was fingerprinted, even if a file is edited in the meantime. This module
does not import torch.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT

CODE = "code"
"""Folder in a run directory with snapshots. The name of a snapshot's folder is its hash."""
SNAPSHOT = re.compile(r"[0-9a-f]{64}(\.partial)?")
"""Matches the name of a snapshot's folder. ``.partial`` marks a snapshot that is not complete."""
PACKAGES = ("recipes", "nemo_convert")
"""Packages of this repository that stages import."""
LOCKS = ("requirements/stack.txt", "requirements/torch.txt")
"""Lock files with library versions, which stages read."""


def read_source(root: Path) -> Mapping[str, bytes]:
    """Reads the code and lock files of a checkout or snapshot. Omits hidden files and bytecode.

    Returns the content of each file by its path relative to ``root``, sorted by path.
    """
    package_paths = [path for package in PACKAGES for path in (root / package).rglob("*")]
    lock_paths = [root / lock for lock in LOCKS]
    files = sorted(path for path in (*package_paths, *lock_paths) if path.is_file())
    contents = {}
    for file in files:
        relative = file.relative_to(root)
        if not any(name.startswith((".", "__pycache__")) for name in relative.parts):
            contents[relative.as_posix()] = file.read_bytes()
    return contents


source_files = cache(read_source)
"""``read_source`` that reads each root only once in a process."""


def hash_source(files: Mapping[str, bytes]) -> str:
    """Returns one SHA-256 of the names and contents of files, which depends on their order."""
    total = hashlib.sha256()
    for name, content in files.items():
        total.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


@cache
def code_hash() -> str:
    """Returns the hash of the checkout or snapshot that this process runs."""
    return hash_source(source_files(REPO_ROOT))


def snapshot_dir(run_dir: Path, code: str) -> Path:
    """Returns the folder of the snapshot with the hash ``code`` in a run."""
    return run_dir / CODE / code


def is_snapshot(path: Path) -> bool:
    """Returns whether an entry of ``code/`` is a snapshot, which may be partial."""
    return SNAPSHOT.fullmatch(path.name) is not None and path.is_dir()


def write_snapshot(run_dir: Path) -> None:
    """Stores this process's code as a snapshot, unless the run already has an intact one.

    The caller must hold the run's lock. After a kill, the next launch deletes the partial snapshot.
    """
    target = snapshot_dir(run_dir, code_hash())
    if target.is_dir() and hash_source(read_source(target)) == target.name:
        return
    partial = target.with_suffix(".partial")
    for folder in (partial, target):
        shutil.rmtree(folder, ignore_errors=True)
    for name, content in source_files(REPO_ROOT).items():
        file = partial / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(0o444)
    partial.rename(target)


def require_snapshot(code: str | None) -> None:
    """Raises ``RecipeError`` if this process does not run the snapshot with the hash ``code``.

    If ``code`` is ``None``, as for a stage that another stage starts, any code is accepted.
    """
    if code is not None and hash_source(read_source(REPO_ROOT)) != code:
        raise RecipeError(
            f"the code in {REPO_ROOT} is not the code that this stage was planned with.",
            "run launch/run.py again with the same arguments: it stores a new copy of the code",
        )
