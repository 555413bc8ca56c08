"""Opens ``records.sqlite``: new, of this layout, or of the layout before, which is carried over.

The tables are looked at before anything is written, so a file of another version stays as it is. Records of the layout
before have no checksums: read, they are carried over in memory; written, in the file, in one transaction. Knows no
meaning of any record.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from evalkit.errors import BadFile, RunMismatch
from evalkit.store.run_folder import bind_identity, check_sealed, computed, seal_all
from evalkit.store.tables import LAYOUT, NEW_TABLES, SCORE_KEY, TABLES, UNVERIFIED_LAYOUT
from evalkit.util.sealed_rows import Sum, canonical, digest_of, hold, holds
from evalkit.util.sqlite import open_to_read, open_to_write, sqlite_errors

__all__ = ["REDO", "block_of", "hold_score", "open_records_to_read", "open_records_to_write", "records_errors"]

_LOG = logging.getLogger(__name__)
_IDENTITY = ("run", "", "run.json")  # the block of the configuration in the table of checksums
REDO = (
    "delete records.sqlite and its -wal file, and repeat the commands of this run; answers of language models stay in "
    "calls.sqlite and are not paid again"
)


def records_errors(path: Path) -> Any:
    """Turn errors of SQLite on the records into a BadFile or a StorageError."""
    room = "free space on the disk, then run the same command again; it resumes, and finished work is kept"
    return sqlite_errors(path, expected="the records of a run", fix=REDO, room=room)


def block_of(*key: Any) -> str:
    """The name of a block of rows in the table of checksums."""
    return canonical(key)


def hold_score(connection: sqlite3.Connection, score: Sequence[Any], judgements: Sequence[Sequence[Any]]) -> None:
    """Write the checksum of a row of ``scores`` together with its rows of ``judgements``."""
    sums = digest_of([score]) + digest_of(judgements)
    connection.execute(
        "INSERT OR REPLACE INTO checksums VALUES ('scores', ?, ?, ?, ?)",
        (score[0], block_of(*score[1:7]), len(judgements), sums),
    )


def open_records_to_write(folder: Path, identity: dict[str, Any]) -> sqlite3.Connection:
    """The records of the run with this configuration, made or carried over where needed.

    Raises RunMismatch, MissingFile, BadFile, StorageError.
    """
    path = folder / "records.sqlite"
    existed = path.exists()
    layout = _layout_to_write(path) if existed else 0
    if layout == LAYOUT:
        check_sealed(folder)
        if computed(folder) and not (folder / "run.json").exists():
            _check_identity(path, identity)
    bind_identity(folder, identity)
    if existed and not layout and computed(folder):
        raise BadFile(str(path), expected="the records of a run", seen="a file without tables", fix=REDO)
    connection = open_to_write(path)
    try:
        with records_errors(path):
            if layout == UNVERIFIED_LAYOUT:
                seal_all(folder)
                _carry_over(connection, path)
                _LOG.warning(
                    "%s: written by an earlier version, without checksums; they were added now, so damage from before "
                    "stays unnoticed",
                    folder,
                )
            elif not layout:
                connection.executescript(TABLES + NEW_TABLES)
                connection.execute(f"PRAGMA user_version = {LAYOUT}")
            if holds(connection, *_IDENTITY) != _sum_of(identity):
                with connection:
                    hold(connection, *_IDENTITY, _rows_of(identity))
    except BaseException:
        connection.close()
        raise
    return connection


def open_records_to_read(folder: Path) -> tuple[sqlite3.Connection, bool]:
    """The records, and whether they have checksums; those without are carried over in memory. Raises BadFile."""
    path = folder / "records.sqlite"
    with records_errors(path):
        connection = open_to_read(path, "sqlite_master")
        try:
            layout = _layout(path, connection)
            if layout == LAYOUT:
                check_sealed(folder)
                return connection, True
            if not layout:
                raise BadFile(str(path), expected="the records of a run", seen="a file without tables", fix=REDO)
        except BaseException:
            connection.close()
            raise
        copy = sqlite3.connect(":memory:", check_same_thread=False)
        connection.backup(copy)
        connection.close()
        _carry_over(copy, path)
    _LOG.warning(
        "%s: unverified: written by an earlier version, without checksums; `evalkit run` with its options adds them",
        folder,
    )
    return copy, False


def _rows_of(identity: dict[str, Any]) -> list[tuple[str]]:
    return [(json.dumps(identity, sort_keys=True),)]


def _sum_of(identity: dict[str, Any]) -> Sum:
    return (1, digest_of(_rows_of(identity)))


def _check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Raise RunMismatch unless a run without its ``run.json`` was made with this configuration."""
    with records_errors(path):
        connection = open_to_read(path, "sqlite_master")
        try:
            held = holds(connection, *_IDENTITY)
        finally:
            connection.close()
    if held != _sum_of(identity):
        raise RunMismatch(
            str(path.parent),
            expected="the options that the run was made with, as its run.json is missing",
            seen="others",
            fix="pass those options, use another --out, or delete the folder to start over",
        )


def _layout_to_write(path: Path) -> int:
    with records_errors(path):
        connection = open_to_read(path, "sqlite_master")
        try:
            return _layout(path, connection)
        finally:
            connection.close()


def _layout(path: Path, connection: sqlite3.Connection) -> int:
    """The layout of the tables, 0 without any. Raises BadFile for one that is unknown, or is not what it claims to be."""
    (layout,) = connection.execute("PRAGMA user_version").fetchone()
    found = _columns(connection)
    if not found and not layout:
        return 0
    seen = f"layout {layout}"
    if layout in (LAYOUT, UNVERIFIED_LAYOUT):
        empty = sqlite3.connect(":memory:")
        empty.executescript(TABLES + (NEW_TABLES if layout == LAYOUT else ""))
        wanted = _columns(empty)
        empty.close()
        # the layout before has no checksums, so a file that has some is one of this layout with a damaged stamp
        wrong = sorted(table for table in {*wanted, "checksums"} if found.get(table) != wanted.get(table))
        if not wrong:
            return int(layout)
        seen = f"layout {layout} with another table {wrong[0]}"
    raise BadFile(
        str(path),
        expected=f"records in layout {LAYOUT}, the one of this version of evalkit",
        seen=seen,
        fix="read it with the version that wrote it, or run again with another --out",
    )


def _columns(connection: sqlite3.Connection) -> dict[str, list[Any]]:
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    return {name: connection.execute(f"PRAGMA table_info('{name}')").fetchall() for (name,) in tables.fetchall()}


def _carry_over(connection: sqlite3.Connection, path: Path) -> None:
    """Give the tables of the layout before their checksums, taking the rows as they are; one transaction."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for statement in filter(str.strip, NEW_TABLES.split(";")):
            connection.execute(statement)
        blocks: dict[str, Callable[[Sequence[Any]], tuple[str, str]]] = {
            "sources": lambda row: ("", row[1]),
            "features": lambda row: (row[0], row[1]),
            "explanations": lambda row: (row[0], block_of(row[1], row[2])),
            "asked": lambda row: ("", row[0]),
        }
        for table, block in blocks.items():
            for row in connection.execute(f"SELECT * FROM {table}").fetchall():
                hold(connection, table, *block(row), [row])
        for name, seconds, detail in connection.execute("SELECT * FROM stages").fetchall():
            connection.execute("INSERT INTO stage_seconds VALUES (?, ?)", (name, seconds))
            hold(connection, "stages", "", name, [(name, detail)])
        try:
            _carry_scores_over(connection)
        except TypeError as error:  # keys of kinds that cannot be compared
            raise BadFile(str(path), expected="the records of a run", seen="keys of another kind", fix=REDO) from error
        connection.execute(f"PRAGMA user_version = {LAYOUT}")


def _carry_scores_over(connection: sqlite3.Connection) -> None:
    writer = connection.cursor()
    judged = groupby(connection.execute(f"SELECT * FROM judgements ORDER BY {SCORE_KEY}, item"), lambda row: row[:7])
    key, rows = next(judged, (None, iter(())))
    for score in connection.execute(f"SELECT * FROM scores ORDER BY {SCORE_KEY}").fetchall():
        while key is not None and key < score[:7]:  # judgements without a score are damage, which stays unnoticed here
            key, rows = next(judged, (None, iter(())))
        mine = [row[7:] for row in rows] if key == score[:7] else []
        hold_score(writer.connection, score, mine)
