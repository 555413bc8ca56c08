"""Opens SQLite files: in WAL mode to write, read-only without side effects to read.

A killed process loses at most its open transaction. Knows no table.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from evalkit.errors import BadFile

__all__ = ["open_to_read", "open_to_write"]

_LOCK_TIMEOUT_S = 60.0  # how long to wait for another process that is writing


def open_to_write(path: Path) -> sqlite3.Connection:
    """A connection in WAL mode. Raises BadFile if the file is not a database."""
    try:
        connection = sqlite3.connect(path, timeout=_LOCK_TIMEOUT_S, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    except sqlite3.DatabaseError as error:
        raise BadFile(
            str(path), expected="a SQLite file that can be written", seen=str(error), fix="move it away and run again"
        ) from error
    return connection


def open_to_read(path: Path, table: str) -> sqlite3.Connection:
    """A read-only connection; on read-only media without the shared memory that WAL needs.

    Raises sqlite3.DatabaseError if ``path`` is not a database or has no such table.
    """
    for mode in ("mode=ro", "mode=ro&immutable=1"):
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, check_same_thread=False)
        try:
            connection.execute(f"SELECT 1 FROM {table} LIMIT 1")
        except sqlite3.OperationalError as error:
            connection.close()
            if "immutable" in mode or "readonly" not in str(error):
                raise
        else:
            return connection
    raise sqlite3.OperationalError("unable to open")
