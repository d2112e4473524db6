"""Provides a folder for an unfinished conversion, and removes it however the conversion ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.files import storage_problem

SUFFIX = ".partial"
"""End of the folder's name. The name starts with a dot and the target's name."""


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """Yields an empty folder on the disk of a target, for files that are not complete yet.

    Creates the target's missing parents, and removes them after an error. Removes the folder at the
    end. A killed process cannot remove its folder, so the next call for the target does.

    Raises:
        RecipeError: The parents cannot be created, or the disk caused an error in the ``with``
            block, for example because it is full.
    """
    missing_parents = [p for p in target.parents if not p.exists()]  # the deepest first
    try:
        _make_parent(target)
        _remove_folders_of_killed(target)
        with (
            tempfile.TemporaryDirectory(
                dir=target.parent, prefix=f".{target.name}.", suffix=SUFFIX
            ) as temporary,
            _lock(Path(temporary)),
        ):
            try:
                yield Path(temporary)
            except RecipeError:
                raise
            except Exception as error:  # libraries raise other errors than OSError on a full disk
                if problem := storage_problem(error, target.parent):
                    raise problem from error
                raise
    except BaseException:
        with suppress(OSError):  # a parent that is not empty stays
            for parent in missing_parents:
                parent.rmdir()
        raise


def _make_parent(target: Path) -> None:
    """Creates the folder of a target; raises ``RecipeError`` if that is not possible."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"{target.parent} cannot be created: {error.strerror}.", "choose another target"
        ) from error


def _remove_folders_of_killed(target: Path) -> None:
    """Removes the folders that killed processes left for a target, and prints their names."""
    for folder in target.parent.glob(f".{escape(target.name)}.*{SUFFIX}"):
        # _lock fails if the process still runs, or without file locks. Then the folder stays.
        with suppress(OSError), _lock(folder):
            shutil.rmtree(folder)
            print(f"removed {folder}, which a killed conversion left")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Locks a folder; the kernel releases the lock if the process is killed.

    Raises:
        OSError: Another process holds the lock, or the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
