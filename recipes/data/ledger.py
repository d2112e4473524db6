"""Stores on disk which documents were seen and which are held out, with the state of the work."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from recipes.core.errors import RecipeError

DIGEST_BYTES = 16
"""Bytes of a digest: see ``corpus.digest``."""


class Ledger:
    """Stores the digests of all documents and, in the same transaction, the ``PreparationState``.

    The digests are on disk, because a Python set of 10^8 digests takes gigabytes. The lock of the
    run directory protects the SQLite file. SQLite does not lock it, because some file systems have
    no locks.

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
                f"{path} is damaged ({result}). Only it records the documents written so far.",
                f"delete {path.parent} to prepare the text again",
            )
        # 256 MiB, because digests are on random pages. With the default of 2 MiB, SQLite writes 65
        # times as many bytes for a million digests.
        self._database.execute("PRAGMA cache_size = -262144")
        self._database.execute("CREATE TABLE IF NOT EXISTS progress (state TEXT)")
        for table in ("seen", "held_out"):
            columns = "(digest BLOB PRIMARY KEY) WITHOUT ROWID"
            self._database.execute(f"CREATE TABLE IF NOT EXISTS {table} {columns}")
        self._database.execute("BEGIN")

    def add_if_new(self, digest: bytes) -> bool:
        """Stores a document's ``corpus.digest``; returns whether it is new."""
        cursor = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,))
        return cursor.rowcount == 1

    def exclude(self, digests: Iterable[str]) -> None:
        """Stores hexadecimal digests, so that their documents count as duplicates."""
        for digest in digests:
            self.add_if_new(bytes.fromhex(digest))

    def hold_out(self, digest: bytes) -> None:
        """Stores that the documents with this ``corpus.split_digest`` are held out."""
        self._database.execute("INSERT OR IGNORE INTO held_out VALUES (?)", (digest,))

    def is_held_out(self, digest: bytes) -> bool:
        """Returns whether documents with this ``corpus.split_digest`` are held out."""
        rows = self._database.execute("SELECT 1 FROM held_out WHERE digest = ?", (digest,))
        return rows.fetchone() is not None

    def read_held_out(self, file: Path) -> None:
        """Holds out the documents of a file from ``write_held_out``, if the file exists."""
        if not file.exists():
            return
        with file.open("rb") as digests:
            while digest := digests.read(DIGEST_BYTES):
                self.hold_out(digest)

    def write_held_out(self, file: Path) -> None:
        """Writes the digests of all held-out documents to a file, sorted."""
        with file.open("wb") as digests:
            rows = self._database.execute("SELECT digest FROM held_out ORDER BY digest")
            digests.writelines(digest for (digest,) in rows)

    def progress(self) -> dict[str, Any] | None:
        """Returns the last state that ``save`` got; ``None`` if there is none."""
        row = self._database.execute("SELECT state FROM progress").fetchone()
        return None if row is None else json.loads(row[0])

    def save(self, progress: dict[str, Any]) -> None:
        """Commits the digests stored so far, together with the state of the work."""
        self._database.execute("DELETE FROM progress")
        self._database.execute("INSERT INTO progress VALUES (?)", (json.dumps(progress),))
        self._database.execute("COMMIT")
        self._database.execute("BEGIN")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()
