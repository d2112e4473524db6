"""Files: written whole or not at all, hashed, read as JSON, and linked where that can be done."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError
from recipes.core.processes import cores

REPO_ROOT = Path(__file__).resolve().parents[2]
HASHING_THREADS = 16
"""At most; beyond, shared storage is the limit."""
NEARLY_NOTHING = 1 << 20
"""Bytes below which a disk is full."""
STORAGE_FIXES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "make it writable, or set run_dir to another directory",
    errno.EACCES: "give yourself the right to it, or set run_dir to another directory",
    errno.EIO: "look at the disk: the kernel's log (dmesg) says more",
}
"""By number of an ``OSError`` that is the disk's."""
ANEW = "it was cut short or edited: make it, or download it, anew"
"""The fix of a file that should hold a JSON object."""


def write_text_atomically(path: Path, text: str) -> None:
    """Writes ``path`` so that a reader sees the old content or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Removes what writers that were killed left in a folder; nothing may be writing there."""
    for partial in folder.glob(".*.partial"):
        partial.unlink(missing_ok=True)


def storage_problem(error: BaseException | None, folder: Path) -> RecipeError | None:
    """What is wrong with the disk that a folder is on, if that is why something failed.

    Args:
        error: What was raised; libraries often hide that the disk is full, so that is looked at,
            too.
        folder: Where it was written to.
    """
    while error is not None:
        if (number := _number(error)) in STORAGE_FIXES:
            where = (error.filename if isinstance(error, OSError) else None) or folder
            return RecipeError(f"{where}: {os.strerror(number)}.", _fix(number))
        error = error.__cause__ or error.__context__
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return None
    if free > NEARLY_NOTHING:
        return None
    return RecipeError(f"{folder}: No space left on device.", _fix(errno.ENOSPC))


def _number(error: BaseException) -> int:
    """What is wrong, which libraries in Rust say in words, as numpy does of a large array."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if said := re.search(r"\(os error (\d+)\)", str(error)):
        return int(said[1])
    return errno.ENOSPC if str(error).startswith("Not enough free space to write") else 0


@contextmanager
def storage_explained(folder: Path) -> Iterator[None]:
    """Says what is wrong with the disk that a folder is on, where that is why something fails."""
    try:
        yield
    except OSError as error:
        if (problem := storage_problem(error, folder)) is None:
            raise
        raise problem from error


def _fix(number: int) -> str:
    return f"{STORAGE_FIXES[number]}; the same command resumes"


def write_json(path: Path, value: object, indent: int = 1) -> None:
    """Writes a value as JSON for people to read, whole or not at all."""
    write_text_atomically(path, json.dumps(value, indent=indent) + "\n")


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Gives a file a second name: no second copy, on a file system with hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_each(paths: Sequence[Path]) -> list[str]:
    """Returns the SHA-256 of every file, read by a thread a core; hashing holds no lock."""
    with ThreadPoolExecutor(min(HASHING_THREADS, cores())) as pool:
        return list(pool.map(sha256_of, paths))


def digest_files(files: Iterable[Path]) -> str:
    """One SHA-256 of several files' names and contents."""
    ordered = sorted(files, key=lambda f: f.name)
    total = hashlib.sha256()
    for file, digest in zip(ordered, sha256_of_each(ordered), strict=True):
        total.update(f"{file.name} {digest}\n".encode())
    return total.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, with a message that names the file when it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is not valid JSON: {error}", ANEW) from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no JSON object.", ANEW)
    return data
