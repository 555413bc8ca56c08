"""The ledger of submitted batches: a SQLite file beside a run's recording, so that no batch is submitted twice.

Each step of a batch is recorded: first the batch with all its requests, before anything is sent; then the id of the
uploaded file; then the time just before the batch is created; then the server's id of the batch; finally that its answers
are recorded. A command that is killed between two steps leaves enough for the next one to find the batch. Rows have
checksums and are verified when they are read. The file holds no API keys and no answers. Queries no server.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evalkit.errors import DamagedFile
from evalkit.llm.accounting.answer_store import KeyedRequest
from evalkit.llm.clients.server.dialects import Dialect
from evalkit.store.tables import LAYOUT
from evalkit.util.sealed_rows import CHECKSUMS, Sum, digest_of, hold, holds, sums_of
from evalkit.util.sqlite import open_to_read, open_to_write, sqlite_errors

__all__ = ["Batch", "Ledger", "requests_in_batches"]

_TABLES = f"""
{CHECKSUMS};
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL, model TEXT NOT NULL, server TEXT NOT NULL,
    dialect TEXT NOT NULL, count INTEGER NOT NULL, file TEXT, begun REAL, batch TEXT, ended TEXT);
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER NOT NULL, place INTEGER NOT NULL, key TEXT NOT NULL, request TEXT NOT NULL,
    PRIMARY KEY (number, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS learned (
    model TEXT NOT NULL, server TEXT NOT NULL, dialect TEXT NOT NULL, forms TEXT NOT NULL,
    PRIMARY KEY (model, server));
"""
_BATCH = "number, name, model, server, dialect, count, file, begun, batch, ended"
_EXPECTED = "a ledger of batches"
_REDO = "move it away and run again; requests whose batches only it knows are submitted and paid again"


@dataclass(slots=True)
class Batch:
    """A batch of requests.

    ``name``: our name for it; ``id``: the server's.
    ``dialect``: the dialect its requests are written in.
    ``number``: counts the batches of a ledger, from 1.
    ``file``: the server's id of the uploaded file.
    ``begun``: the time just before it was created (Unix time, seconds).
    ``ended``: whether all its results are recorded.
    """

    name: str
    requests: Mapping[str, KeyedRequest]  # by key, in the order of the lines
    dialect: Dialect
    number: int = 0
    file: str | None = None
    begun: float | None = None
    id: str | None = None
    lines: list[bytes] = field(default_factory=list)  # to upload; not in the ledger
    ended: bool = False


class Ledger:
    """The batches of one model at one server. ``path``: the file; None keeps the ledger in memory only.

    Raises BadFile, StorageError.
    """

    def __init__(self, path: Path | None, model: str, server: str) -> None:
        self.path, self._model, self._server = path, model, server
        self._database = sqlite3.connect(":memory:") if path is None else open_to_write(path)
        with _errors(path):
            self._database.execute("PRAGMA synchronous = FULL")  # rows are few, and losing one loses a paid batch
            self._database.executescript(_TABLES)
            self._database.execute(f"SELECT {_BATCH} FROM batches")
            self._carry_over()

    def _carry_over(self) -> None:
        """Give the rows of an earlier version checksums, taking them as they are."""
        if self._database.execute("PRAGMA user_version").fetchone()[0] == LAYOUT:
            return
        with self._database as database:
            database.execute("BEGIN IMMEDIATE")
            for name, number in database.execute("SELECT name, number FROM batches").fetchall():
                self._hold_batch(name)
                self._hold_requests(number)
            for model, server in database.execute("SELECT model, server FROM learned").fetchall():
                self._hold_learned(model, server)
            database.execute(f"PRAGMA user_version = {LAYOUT}")

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with _errors(self.path), self._database:
            yield self._database

    def _set(self, batch: Batch, column: str, value: str | float) -> None:
        with self._writing() as database:
            database.execute(f"UPDATE batches SET {column} = ? WHERE name = ?", (value, batch.name))
            self._hold_batch(batch.name)

    def _hold_batch(self, name: str) -> None:
        rows = self._database.execute(f"SELECT {_BATCH} FROM batches WHERE name = ?", (name,)).fetchall()
        hold(self._database, "batches", "", name, rows)

    def _hold_requests(self, number: int) -> None:
        hold(self._database, "requests", "", str(number), _request_rows(self._database, number))

    def _hold_learned(self, model: str, server: str) -> None:
        query = "SELECT * FROM learned WHERE model = ? AND server = ?"
        hold(self._database, "learned", model, server, self._database.execute(query, (model, server)).fetchall())

    def write(self, batch: Batch) -> None:
        """Record a new batch, before anything of it is sent, and set its number."""
        with self._writing() as database:
            row = (batch.name, self._model, self._server, _packed(batch.dialect), len(batch.requests))
            cursor = database.execute(
                "INSERT INTO batches (name, model, server, dialect, count) VALUES (?, ?, ?, ?, ?)", row
            )
            batch.number = int(cursor.lastrowid or 0)
            rows = ((batch.number, place, one.key, one.text) for place, one in enumerate(batch.requests.values()))
            database.executemany("INSERT INTO requests VALUES (?, ?, ?, ?)", rows)
            self._hold_batch(batch.name)
            self._hold_requests(batch.number)

    def uploaded(self, batch: Batch, file: str) -> None:
        self._set(batch, "file", file)
        batch.file = file

    def begins(self, batch: Batch, time: float) -> None:
        """Record that it is about to be created: from now on the server may have it, even if no answer arrives."""
        self._set(batch, "begun", time)
        batch.begun = time

    def created(self, batch: Batch, id: str) -> None:
        self._set(batch, "batch", id)
        batch.id = id

    def ended(self, batch: Batch, how: str) -> None:
        """Record that all its results are kept, or that it has none, and forget its requests."""
        with self._writing() as database:
            database.execute("UPDATE batches SET ended = ? WHERE name = ?", (how, batch.name))
            database.execute("DELETE FROM requests WHERE number = ?", (batch.number,))
            self._hold_batch(batch.name)
            self._hold_requests(batch.number)
        batch.ended = True

    def open_batches(self) -> list[Batch]:
        """The batches that have not ended, oldest first. Raises DamagedFile."""
        return [
            Batch(name, self._requests(number), _unpacked(dialect), number, file, begun, id)
            for number, name, model, server, dialect, _, file, begun, id, ended in self._batches()
            if ended is None and (model, server) == (self._model, self._server)
        ]

    def _batches(self) -> list[tuple[Any, ...]]:
        """Every row of a batch, oldest first. Raises BadFile."""
        with _errors(self.path):
            return _verified_batches(self._database, self.path)

    def elsewhere(self) -> dict[str, int]:
        """The model's requests in batches at other servers that have not ended: base URL → number of requests.

        The same server under another URL counts as another server.
        """
        counts: Counter[str] = Counter()
        for _, _, model, server, _, count, _, _, id, ended in self._batches():
            if ended is None and id is not None and model == self._model and server != self._server:
                counts[server] += count
        return dict(sorted(counts.items()))

    def _requests(self, number: int) -> dict[str, KeyedRequest]:
        with _errors(self.path):
            rows = _verified_requests(self._database, self.path, number)
        return {key: KeyedRequest(key, self._model, text) for _, _, key, text in rows}

    def learn(self, dialect: Dialect, forms: set[str]) -> None:
        """Record the server's dialect and the forms of requests that it has answered."""
        row = (self._model, self._server, _packed(dialect), json.dumps(sorted(forms)))
        with self._writing() as database:
            database.execute("INSERT OR REPLACE INTO learned VALUES (?, ?, ?, ?)", row)
            self._hold_learned(self._model, self._server)

    def learned(self) -> tuple[Dialect, set[str]] | None:
        """What ``learn`` was told last."""
        with _errors(self.path):
            query = "SELECT * FROM learned WHERE model = ? AND server = ?"
            rows = self._database.execute(query, (self._model, self._server)).fetchall()
            held = holds(self._database, "learned", self._model, self._server)
        _compare(self.path, "what is known of the server", rows, held)
        return (_unpacked(rows[0][2]), set(json.loads(rows[0][3]))) if rows else None

    def close(self) -> None:
        self._database.close()


def requests_in_batches(path: Path, model: str) -> list[KeyedRequest]:
    """The requests of a model in batches that have not ended; empty if there is no readable ledger."""
    if not path.is_file():
        return []
    with _errors(path), closing(open_to_read(path, "sqlite_master")) as database:
        if database.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
            return []  # the process was killed after it created the file and before it created the tables
        found = {
            key: KeyedRequest(key, model, text)
            for number, _, of, _, _, _, _, _, id, ended in _verified_batches(database, path)
            if ended is None and id is not None and of == model
            for _, _, key, text in _verified_requests(database, path, number)
        }
    return [found[key] for key in sorted(found)]


def _errors(path: Path | None) -> AbstractContextManager[None]:
    return sqlite_errors(
        path, expected=_EXPECTED, fix=_REDO, room="free space on the disk, then run the same command again; it resumes"
    )


def _request_rows(database: sqlite3.Connection, number: int) -> list[tuple[Any, ...]]:
    return database.execute("SELECT * FROM requests WHERE number = ? ORDER BY place", (number,)).fetchall()


def _is_verified(database: sqlite3.Connection) -> bool:
    """Whether rows have checksums; those of an earlier version get them when it is opened to write."""
    return bool(database.execute("PRAGMA user_version").fetchone()[0] == LAYOUT)


def _verified_batches(database: sqlite3.Connection, path: Path | None) -> list[tuple[Any, ...]]:
    rows = database.execute(f"SELECT {_BATCH} FROM batches ORDER BY number").fetchall()
    if _is_verified(database):
        held = sums_of(database, "batches")
        for row in rows:
            _compare(path, f"the batch {row[1]}", [row], held.pop(("", row[1]), None))
        for _, name in held:
            _compare(path, f"the batch {name}", [], (1, b""))
    return rows


def _verified_requests(database: sqlite3.Connection, path: Path | None, number: int) -> list[tuple[Any, ...]]:
    rows = _request_rows(database, number)
    if _is_verified(database):
        _compare(path, f"the requests of batch {number}", rows, holds(database, "requests", "", str(number)))
    return rows


def _compare(path: Path | None, what: str, rows: Sequence[Sequence[Any]], held: Sum | None) -> None:
    """Raise DamagedFile unless these are the rows that were written."""
    if (rows and held is None) or (held is not None and held != (len(rows), digest_of(rows))):
        raise DamagedFile(
            str(path), expected=f"{what}, as written", seen="something else" if rows else "nothing", fix=_REDO
        )


def _packed(dialect: Dialect) -> str:
    return json.dumps({"kind": dialect.kind, "refused": sorted(dialect.refused)})


def _unpacked(text: str) -> Dialect:
    found = json.loads(text)
    return Dialect(found["kind"], set(found["refused"]))
