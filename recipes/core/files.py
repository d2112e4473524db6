"""Writes files atomically, hashes and links files, and explains disk errors."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from recipes.core.errors import RecipeError
from recipes.core.processes import cores

REPO_ROOT = Path(__file__).resolve().parents[2]
MAX_HASHING_THREADS = 16
"""More threads are not faster on shared storage."""
MIN_FREE_BYTES = 1 << 20
"""A disk with less free space counts as full."""
STORAGE_FIXES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "make it writable, or choose another directory (run_dir of a run)",
    errno.EACCES: "make it writable for you, or choose another directory (run_dir of a run)",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EIO: "check the disk; the kernel's log (dmesg) says more",
}
"""How to fix a disk error, by ``errno``. "It" is the path that the error message names."""
UNREADABLE_FIX = "make it readable for you, and its folders"
"""Fix of ``EACCES`` if reading was refused. ``STORAGE_FIXES`` has the fix for a refused write."""
PARTIAL = ".*.partial"
"""Glob pattern of the temporary files that ``write_text_atomically`` renames when complete."""
JSON_FIX = "it was truncated or edited, or is a Git LFS pointer: write it or download it again"


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a file so that readers see either the old content or all of the new content."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the file names of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def remove_partial(folder: Path) -> None:
    """Removes partial files of killed processes. No process may be writing to the folder."""
    for partial in folder.glob(PARTIAL):
        partial.unlink(missing_ok=True)


def storage_problem(error: BaseException | None, folder: Path) -> RecipeError | None:
    """Returns an explanation of an error that a disk caused; ``None`` for other errors.

    Libraries often hide that the disk is full. So an error without an ``errno`` of
    ``STORAGE_FIXES``, even in its causes, is explained by a full disk if the folder's disk is full.
    ``folder`` is the folder that was written to. Without an error, only its free space is checked.
    """
    while error is not None:  # the error, then the errors that caused it
        if (code := _errno(error)) in STORAGE_FIXES:
            named_path = error.filename if isinstance(error, OSError) else None
            return _storage_error(named_path or folder, code)
        error = error.__cause__ or error.__context__
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return None
    if free > MIN_FREE_BYTES:
        return None
    return _storage_error(folder, errno.ENOSPC)


def _errno(error: BaseException) -> int:
    """Returns an error's ``errno``; 0 if it has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # "(os error 28)" of Rust libraries
        return int(match[1])
    is_full = str(error).startswith("Not enough free space to write")  # NumPy
    return errno.ENOSPC if is_full else 0


def _storage_error(path: str | Path, code: int) -> RecipeError:
    fix = UNREADABLE_FIX if code == errno.EACCES and _is_unreadable(path) else STORAGE_FIXES[code]
    return RecipeError(f"{path}: {os.strerror(code)}.", f"{fix}, then repeat the command")


def _is_unreadable(path: str | Path) -> bool:
    """Returns whether a file, or the folder of a file that seems missing, cannot be read."""
    existing = path if os.path.exists(path) else Path(path).parent
    return not os.access(existing, os.R_OK, effective_ids=True)


@contextmanager
def explain_storage_errors(folder: Path) -> Iterator[None]:
    """Replaces an ``OSError`` of the block by a ``RecipeError`` if the folder's disk caused it."""
    try:
        yield
    except OSError as error:
        if (problem := storage_problem(error, folder)) is None:
            raise
        raise problem from error


def json_text(value: Any, non_finite: Callable[[float], str | None] = str, **options: Any) -> str:
    """Returns a value as JSON. ``options`` are those of ``json.dumps``.

    ``non_finite`` replaces NaN and infinity, which JSON lacks. By default it returns strings such
    as "nan", which pydantic reads as numbers.
    """

    def without_non_finite(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return non_finite(item)
        if isinstance(item, dict):
            return {key: without_non_finite(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [without_non_finite(entry) for entry in item]
        return item

    return json.dumps(without_non_finite(value), **options)


def write_json(path: Path, value: object, indent: int = 1) -> None:
    """Writes a value as indented JSON, atomically."""
    write_text_atomically(path, json.dumps(value, indent=indent) + "\n")


def write_yaml(path: Path, value: object) -> None:
    """Writes a value as YAML, atomically.

    OmegaConf would be slower, and would later read "${" in a value as an interpolation.
    """
    text = yaml.dump(value, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True)
    write_text_atomically(path, text)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Makes a hard link to a file, or a copy if that fails, for example across file systems."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_each(paths: Sequence[Path]) -> list[str]:
    """Returns the SHA-256 of each file, in the order of ``paths``.

    Uses threads, because hashing releases the GIL. A file to which several of the paths link is
    read only once: dataset splits may link to one token file.
    """
    files = [path.resolve() for path in paths]
    unique = list(dict.fromkeys(files))
    with ThreadPoolExecutor(min(MAX_HASHING_THREADS, cores())) as pool:
        hashes = dict(zip(unique, pool.map(sha256_of, unique), strict=True))
    return [hashes[file] for file in files]


def folder_bytes(folder: Path) -> int:
    """Returns the total size in bytes of all files below a folder.

    Files that another process deletes during the call do not count.
    """
    sizes = {}  # by device and inode, so that several hard links to one file count once
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                stat = os.lstat(os.path.join(path, name))
                sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())


def digest_files(files: Iterable[Path]) -> str:
    """Returns one SHA-256 of the names and contents of files, independent of the files' order."""
    paths = list(files)
    total = hashlib.sha256()
    names_and_hashes = zip([path.name for path in paths], sha256_of_each(paths), strict=True)
    # Sorts by name, then by hash: files in different folders may have the same name.
    for name, digest in sorted(names_and_hashes):
        total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ``RecipeError`` if the file does not contain one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid JSON: {error}", JSON_FIX) from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path} does not contain a JSON object.", JSON_FIX)
    return data


def read_yaml(path: Path) -> Any:
    """Reads a YAML file. Raises ``yaml.YAMLError`` if the file is not YAML."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
