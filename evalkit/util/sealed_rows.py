"""Checksums of rows in a SQLite file: of every block of rows that is written and read together.

The table ``checksums`` holds, per block, how many rows it has and a hash of their values. It is written in the
transaction that writes the rows, so a block that is held here and has no rows was lost, and rows that are not held here
are damaged. Knows no other table.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["CHECKSUMS", "canonical", "digest_of", "forget", "hold", "holds", "sums_of"]

CHECKSUMS = """CREATE TABLE IF NOT EXISTS checksums (
    stage TEXT NOT NULL, source TEXT NOT NULL, block TEXT NOT NULL, rows INTEGER NOT NULL, checksum BLOB NOT NULL,
    PRIMARY KEY (stage, source, block)) WITHOUT ROWID"""

_HASH_BYTES = 8
Sum = tuple[int, bytes]


def digest_of(rows: Iterable[Sequence[Any]]) -> bytes:
    """A hash of rows, the same for what is written and for what SQLite returns for it."""
    text = canonical([[_stored(value) for value in row] for row in rows])
    return hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest()


def canonical(value: Any) -> str:
    """JSON; of bytes, which no record has unless it is damaged, their digits."""
    return json.dumps(value, separators=(",", ":"), default=lambda other: {"bytes": bytes(other).hex()})


def _stored(value: Any) -> Any:
    """SQLite has no truth values and no NaN, and may return a whole number as an integer or as a float."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None if math.isnan(value) else value
    return int(value) if isinstance(value, bool) else value


def hold(connection: sqlite3.Connection, stage: str, source: str, block: str, rows: Sequence[Sequence[Any]]) -> None:
    """Write the checksum of a block, in the caller's transaction."""
    connection.execute(
        "INSERT OR REPLACE INTO checksums VALUES (?, ?, ?, ?, ?)", (stage, source, block, len(rows), digest_of(rows))
    )


def forget(connection: sqlite3.Connection, stage: str, source: str, blocks: Iterable[str] | None = None) -> None:
    """Delete the checksums of blocks, by default of all of a source."""
    if blocks is None:
        connection.execute("DELETE FROM checksums WHERE stage = ? AND source = ?", (stage, source))
    else:
        connection.executemany(
            "DELETE FROM checksums WHERE stage = ? AND source = ? AND block = ?",
            ((stage, source, block) for block in blocks),
        )


def holds(connection: sqlite3.Connection, stage: str, source: str, block: str) -> Sum | None:
    """The rows and the checksum of one block."""
    query = "SELECT rows, checksum FROM checksums WHERE stage = ? AND source = ? AND block = ?"
    found: Sum | None = connection.execute(query, (stage, source, block)).fetchone()
    return found


def sums_of(connection: sqlite3.Connection, stage: str, source: str | None = None) -> dict[tuple[str, str], Sum]:
    """The rows and the checksum of every block of a stage by (source, block), or of those of one source."""
    query = "SELECT source, block, rows, checksum FROM checksums WHERE stage = ?"
    query += "" if source is None else " AND source = ?"
    found = connection.execute(query, (stage,) if source is None else (stage, source))
    return {(of, block): (rows, checksum) for of, block, rows, checksum in found}
