"""The ledger of submitted batches: a SQLite file beside a run's recording, so that no batch is submitted twice.

Each step of a batch is recorded: first the batch with all its requests, before anything is sent; then the id of the
uploaded file; then the time just before the batch is created; then the server's id of the batch; finally that its answers
are recorded. A command that is killed between two steps leaves enough for the next one to find the batch. The file holds
no API keys and no answers. Queries no server.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from evalkit.errors import BadFile, StorageError
from evalkit.llm.accounting.answer_store import KeyedRequest
from evalkit.llm.clients.server.dialects import Dialect
from evalkit.util.sqlite import open_to_read, open_to_write

__all__ = ["Batch", "Ledger", "requests_in_batches"]

_TABLES = """
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
_SET = "UPDATE batches SET {} = ? WHERE name = ?"


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
        try:
            self._database.execute("PRAGMA synchronous = FULL")  # rows are few, and losing one loses a paid batch
            self._database.executescript(_TABLES)
            self._database.execute(
                "SELECT number, name, model, server, dialect, count, file, begun, batch, ended FROM batches"
            )
        except sqlite3.DatabaseError as error:
            raise BadFile(
                str(path), expected="a ledger of batches", seen=str(error), fix="move it away and run again"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._database:
                yield self._database
        except sqlite3.OperationalError as error:
            raise StorageError(
                str(self.path),
                expected="a file that can be written",
                seen=str(error),
                fix="free space on the disk, then run the same command again; it resumes",
            ) from error

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

    def uploaded(self, batch: Batch, file: str) -> None:
        with self._writing() as database:
            database.execute(_SET.format("file"), (file, batch.name))
        batch.file = file

    def begins(self, batch: Batch, time: float) -> None:
        """Record that it is about to be created: from now on the server may have it, even if no answer arrives."""
        with self._writing() as database:
            database.execute(_SET.format("begun"), (time, batch.name))
        batch.begun = time

    def created(self, batch: Batch, id: str) -> None:
        with self._writing() as database:
            database.execute(_SET.format("batch"), (id, batch.name))
        batch.id = id

    def ended(self, batch: Batch, how: str) -> None:
        """Record that all its results are kept, or that it has none, and forget its requests."""
        with self._writing() as database:
            database.execute(_SET.format("ended"), (how, batch.name))
            database.execute("DELETE FROM requests WHERE number = ?", (batch.number,))
        batch.ended = True

    def open_batches(self) -> list[Batch]:
        """The batches that have not ended, oldest first."""
        rows = self._database.execute(
            "SELECT name, dialect, number, file, begun, batch FROM batches "
            "WHERE ended IS NULL AND model = ? AND server = ? ORDER BY number",
            (self._model, self._server),
        ).fetchall()
        return [
            Batch(name, self._requests(number), _unpacked(dialect), number, file, begun, id)
            for name, dialect, number, file, begun, id in rows
        ]

    def elsewhere(self) -> dict[str, int]:
        """The model's requests in batches at other servers that have not ended: base URL → number of requests.

        The same server under another URL counts as another server.
        """
        rows = self._database.execute(
            "SELECT server, total(count) FROM batches "
            "WHERE ended IS NULL AND batch IS NOT NULL AND model = ? AND server != ? GROUP BY server ORDER BY server",
            (self._model, self._server),
        )
        return {server: int(count) for server, count in rows}

    def _requests(self, number: int) -> dict[str, KeyedRequest]:
        rows = self._database.execute("SELECT key, request FROM requests WHERE number = ? ORDER BY place", (number,))
        return {key: KeyedRequest(key, self._model, text) for key, text in rows}

    def learn(self, dialect: Dialect, forms: set[str]) -> None:
        """Record the server's dialect and the forms of requests that it has answered."""
        row = (self._model, self._server, _packed(dialect), json.dumps(sorted(forms)))
        with self._writing() as database:
            database.execute("INSERT OR REPLACE INTO learned VALUES (?, ?, ?, ?)", row)

    def learned(self) -> tuple[Dialect, set[str]] | None:
        """The arguments of the last call of ``learn``, None without one."""
        row = self._database.execute(
            "SELECT dialect, forms FROM learned WHERE model = ? AND server = ?", (self._model, self._server)
        ).fetchone()
        return None if row is None else (_unpacked(row[0]), set(json.loads(row[1])))

    def close(self) -> None:
        self._database.close()


def requests_in_batches(path: Path, model: str) -> list[KeyedRequest]:
    """The requests of a model in batches that have not ended; empty if there is no readable ledger."""
    if not path.is_file():
        return []
    try:
        with closing(open_to_read(path, "batches")) as database:
            rows = database.execute(
                "SELECT DISTINCT key, request FROM requests JOIN batches USING (number) "
                "WHERE ended IS NULL AND batch IS NOT NULL AND model = ? ORDER BY key",
                (model,),
            ).fetchall()
    except sqlite3.DatabaseError:
        return []
    return [KeyedRequest(key, model, text) for key, text in rows]


def _packed(dialect: Dialect) -> str:
    return json.dumps({"kind": dialect.kind, "refused": sorted(dialect.refused)})


def _unpacked(text: str) -> Dialect:
    found = json.loads(text)
    return Dialect(found["kind"], set(found["refused"]))
