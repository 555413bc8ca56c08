"""How this project opens SQLite: in WAL mode to write, without touching anything to read.

A process that is killed loses at most the transaction it was in. Knows no table.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from evalkit.errors import BadFile

__all__ = ["open_to_read", "open_to_write"]

_PATIENCE_S = 60.0  # for another process that is writing


def open_to_write(path: Path) -> sqlite3.Connection:
    """A connection in WAL mode. Raises BadFile for what is no database."""
    try:
        connection = sqlite3.connect(path, timeout=_PATIENCE_S, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    except sqlite3.DatabaseError as error:
        raise BadFile(
            str(path), expected="a SQLite file that can be written", seen=str(error), fix="move it away and run again"
        ) from error
    return connection


def open_to_read(path: Path, table: str) -> sqlite3.Connection:
    """Read-only; on media that cannot be written at all, without the shared memory that WAL would need.

    Raises sqlite3.DatabaseError where ``path`` is no database or has no such table.
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
