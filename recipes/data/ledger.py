"""Record of the documents that were written, from which a killed process resumes."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from recipes.core.errors import RecipeError


class Ledger:
    """Stores every document's digest and the state of the work in one transaction.

    It is on disk because a Python set of 10^8 digests takes gigabytes.

    Args:
        path: SQLite file. It is not locked, since some file systems cannot: the run has a lock.

    Raises:
        RecipeError: The file is damaged.
    """

    def __init__(self, path: Path) -> None:
        uri = f"{path.absolute().as_uri()}?nolock=1"
        self._database = sqlite3.connect(uri, uri=True, isolation_level=None)
        try:
            [result] = self._database.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            result = str(error)
        if result != "ok":
            raise RecipeError(
                f"{path} is damaged ({result}): nothing else records the documents written so far.",
                f"delete {path.parent} to prepare the text again",
            )
        self._database.execute("CREATE TABLE IF NOT EXISTS progress (state TEXT)")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID"
        )
        self._database.execute("BEGIN")

    def is_new(self, digest: bytes) -> bool:
        """Adds a document; returns whether it was not there yet."""
        cursor = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,))
        return cursor.rowcount == 1

    def progress(self) -> dict[str, Any] | None:
        """Returns the state that was saved last, if any."""
        row = self._database.execute("SELECT state FROM progress").fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, progress: dict[str, Any]) -> None:
        """Saves the documents added so far and this state."""
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
