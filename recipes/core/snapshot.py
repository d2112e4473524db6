"""Copies this repository's code into a run, so that stages run the code that was fingerprinted.

The launcher reads the code once and uses the same bytes for fingerprints and for the copy, so an
edit between the two has no effect. This module does not import torch.
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
"""Folder in a run directory with the snapshots, each in a folder named by its hash."""
SNAPSHOT = re.compile(r"[0-9a-f]{64}(\.partial)?")
"""Matches the name of a snapshot's folder. A killed launcher leaves a partial snapshot."""
PACKAGES = ("recipes", "nemo_convert")
"""Packages of this repository that stages import."""
LOCKS = ("requirements/stack.txt", "requirements/torch.txt")
"""Lock files with library versions. Stages read them, and they are outside ``PACKAGES``."""


def read_source(root: Path) -> Mapping[str, bytes]:
    """Returns the content of each code file of a checkout or a snapshot, by relative path."""
    paths = [path for package in PACKAGES for path in (root / package).rglob("*")]
    files = [path for path in (*paths, *(root / lock for lock in LOCKS)) if path.is_file()]
    relative = {path.relative_to(root): path for path in sorted(files)}
    return {
        name.as_posix(): path.read_bytes()
        for name, path in relative.items()
        if not any(part.startswith((".", "__pycache__")) for part in name.parts)
    }


source_files = cache(read_source)
"""Does the same as ``read_source``, but reads each folder only once in a process."""


def hash_source(files: Mapping[str, bytes]) -> str:
    """Returns one SHA-256 of the names and contents of files."""
    total = hashlib.sha256()
    for name, content in files.items():
        total.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


@cache
def code_hash() -> str:
    """Returns the hash of this process's code."""
    return hash_source(source_files(REPO_ROOT))


def snapshot_dir(run_dir: Path, code: str) -> Path:
    """Returns the folder of a snapshot in a run. ``code`` is the snapshot's hash."""
    return run_dir / CODE / code


def is_snapshot(path: Path) -> bool:
    """Returns whether an entry of ``code/`` is a snapshot, which may be partial."""
    return SNAPSHOT.fullmatch(path.name) is not None and path.is_dir()


def write_snapshot(run_dir: Path) -> None:
    """Stores this process's code in a run, unless it is there. The caller holds the run's lock."""
    target = snapshot_dir(run_dir, code_hash())
    if target.is_dir() and hash_source(read_source(target)) == target.name:
        return
    partial = target.with_suffix(".partial")  # after a kill, the next launch deletes this folder
    for folder in (partial, target):
        shutil.rmtree(folder, ignore_errors=True)
    for name, content in source_files(REPO_ROOT).items():
        file = partial / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(0o444)
    partial.rename(target)


def require_snapshot(code: str | None) -> None:
    """Refuses to run a stage if the code has changed since the plan.

    Args:
        code: Hash of the planned code; ``None`` accepts any code, for stages that a stage starts.
    """
    if code is not None and hash_source(read_source(REPO_ROOT)) != code:
        raise RecipeError(
            f"the code in {REPO_ROOT} is not the code that this stage was planned with.",
            "run launch/run.py again with the same arguments: it stores a new copy of the code",
        )
