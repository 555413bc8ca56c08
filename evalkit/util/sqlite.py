"""Opens SQLite files: in WAL mode to write, read-only without side effects to read; and says what their errors mean.

A killed process loses at most its open transaction. Knows no table.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from evalkit.errors import BadFile, DamagedFile, StorageError

__all__ = ["open_to_read", "open_to_write", "sqlite_errors"]

_LOCK_TIMEOUT_S = 60.0  # how long to wait for another process that is writing
# what the disk or another process is to blame for; every other code means that the content is damaged
_STORAGE = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOMEM,
}
_SHORT = {sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_READ}  # a file that ends too early
_SEEN = {sqlite3.SQLITE_CORRUPT: "a damaged database", sqlite3.SQLITE_NOTADB: "file is not a database"}


@contextlib.contextmanager
def sqlite_errors(path: Path | None, *, expected: str, fix: str, room: str) -> Iterator[None]:
    """Turn an error of SQLite into a BadFile or DamagedFile where the content is to blame, else into a StorageError.

    expected, fix: of the BadFile
    room: the ``fix`` of the StorageError
    """
    try:
        yield
    except sqlite3.ProgrammingError:  # a mistake of ours, such as a closed file
        raise
    except UnicodeDecodeError as error:  # in the text of SQLite's own error, which quotes the file
        raise DamagedFile(str(path), expected=expected, seen="a damaged database", fix=fix) from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if code & 0xFF in _STORAGE and code not in _SHORT:
            raise StorageError(str(path), expected="a file that can be written", seen=str(error), fix=room) from error
        # a text that Python cannot decode has no code
        damaged = code & 0xFF in _SEEN or code in _SHORT or not hasattr(error, "sqlite_errorcode")
        kind = DamagedFile if damaged else BadFile
        raise kind(str(path), expected=expected, seen=_SEEN.get(code & 0xFF, str(error)), fix=fix) from error


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
