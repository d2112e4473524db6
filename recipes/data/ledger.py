"""What has been taken of the text: a record on disk that a killed process goes on from."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from recipes.core.errors import RecipeError


class Ledger:
    """Every document's digest, and how far the work is; both are kept together or not at all.

    On disk, since 16 bytes of each of 10^8 documents are gigabytes in any set of Python's.

    Args:
        path: SQLite file. It is not locked, for file systems that cannot: a run has its own lock.

    Raises:
        RecipeError: The file is damaged.
    """

    def __init__(self, path: Path) -> None:
        uri = f"{path.absolute().as_uri()}?nolock=1"
        self._database = sqlite3.connect(uri, uri=True, isolation_level=None)
        try:
            [found] = self._database.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            found = str(error)
        if found != "ok":
            raise RecipeError(
                f"{path} is damaged ({found}): what was taken of the text is not known.",
                f"delete {path.parent} to prepare the text anew",
            )
        self._database.execute("CREATE TABLE IF NOT EXISTS progress (state TEXT)")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID"
        )
        self._database.execute("BEGIN")

    def is_new(self, digest: bytes) -> bool:
        """Takes a document down; whether it is the first of its kind."""
        cursor = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,))
        return cursor.rowcount == 1

    def progress(self) -> dict[str, Any] | None:
        """What was kept last, if anything was."""
        row = self._database.execute("SELECT state FROM progress").fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, progress: dict[str, Any]) -> None:
        """Keeps all that was taken down so far, and this with it."""
        self._database.execute("DELETE FROM progress")
        self._database.execute("INSERT INTO progress VALUES (?)", (json.dumps(progress),))
        self._database.execute("COMMIT")
        self._database.execute("BEGIN")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._database.close()
