"""The recording: a SQLite file with one row per answered request, keyed by a hash of the request's content.

Every answer is committed as soon as it arrives, so a crash loses nothing that was paid for. The file holds no API keys and
no headers, because requests do not contain them. Knows no client.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evalkit.errors import BadFile, DamagedFile, StorageError
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Response
from evalkit.store.tables import LAYOUT
from evalkit.util.sealed_rows import CHECKSUMS, Sum, digest_of, hold, holds, sums_of
from evalkit.util.sqlite import open_to_read, open_to_write, sqlite_errors

__all__ = ["KeyedRequest", "Recorded", "Recording", "Spent"]

_LOG = logging.getLogger(__name__)
_STAGE = "answers"  # in the table of checksums, where every answer is a block under its key
_ROOM = "free space on the disk, or record to another folder"
_TABLE = """CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, request TEXT NOT NULL, response TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, seconds REAL NOT NULL, paid INTEGER NOT NULL
    ) WITHOUT ROWID"""
_COLUMNS = "key, model, request, response, prompt_tokens, completion_tokens, seconds"
# paid: 0 if the answer was copied from another recording, 1 if this run sent the request, 2 if it sent it in a batch
_KINDS = (str, str, str, str, int, int, int | float, int)  # of the columns and of paid
_BATCHED = 2
_ADD = f"INSERT OR IGNORE INTO answers ({_COLUMNS}, paid) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """A request as it is recorded: ``text`` is its canonical JSON, ``key`` the hash of ``text``."""

    key: str
    model: str
    text: str

    @classmethod
    def of(cls, model: str, request: GenerateRequest) -> KeyedRequest:
        """The request to ``model`` with its key."""
        text = request.canonical_json(model)
        return cls(hashlib.blake2b(text.encode(), digest_size=20).hexdigest(), model, text)

    def content(self) -> GenerateRequest:
        """The request that ``text`` describes."""
        return GenerateRequest.from_json(self.text)


@dataclass(frozen=True, slots=True)
class Recorded:
    """An answer and the ``seconds`` from sending the request to receiving the answer."""

    response: Response
    seconds: float


@dataclass(frozen=True, slots=True)
class Spent:
    """Totals over the answers of a recording, without those copied from another recording.

    ``batched_…``: the part of each total that was sent in batches.
    ``prompt_characters``: length of the requests' canonical JSON.
    ``seconds``: summed over the calls that were not sent in batches.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_characters: int = 0
    seconds: float = 0.0
    batched_calls: int = 0
    batched_prompt_tokens: int = 0
    batched_completion_tokens: int = 0

    @property
    def timed_calls(self) -> int:
        """The number of calls that ``seconds`` covers: all that were not sent in batches."""
        return self.calls - self.batched_calls


class Recording:
    """The recording in the file ``path``; ``write=True`` allows adding answers and creates the file if it is missing.

    Raises BadFile, StorageError.

    Every answer has a checksum and is verified when it is read. A recording of an earlier version has none: it is read
    unverified, and gets them when it is opened to write.
    """

    def __init__(self, path: Path, *, write: bool) -> None:
        self.path = path
        self._write = write
        with self._errors():
            try:
                if write:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._database = open_to_write(path)
                    self._check_layout()
                    self._prepare()
                else:
                    self._database = _open_to_read(path)
                    self._check_layout()
                self._verified = _layout(self._database) == LAYOUT
                self._database.execute(f"SELECT {_COLUMNS} FROM answers LIMIT 1")
                if self._verified:
                    sums_of(self._database, _STAGE, "no such source")  # the table is there
            except OSError as error:
                raise StorageError(
                    str(path), expected="a file that can be written", seen=error.strerror or str(error), fix=_ROOM
                ) from error

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return sqlite_errors(
            self.path,
            expected="a recording made by the replay client",
            fix="give the path of another recording; or delete this one, and its answers are asked for and paid again",
            room=_ROOM,
        )

    def _check_layout(self) -> None:
        if (layout := _layout(self._database)) not in (0, LAYOUT):
            raise BadFile(
                str(self.path),
                expected=f"a recording in layout {LAYOUT}",
                seen=f"layout {layout}",
                fix="use the version of evalkit that made it, or record to another folder",
            )

    def _prepare(self) -> None:
        """Make the tables; or give the answers of an earlier version checksums, taking them as they are."""
        if _layout(self._database) == LAYOUT:
            return
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            layout = _layout(self._database)  # another process may have been here first
            if layout == LAYOUT:
                return
            self._database.execute(_TABLE)
            self._database.execute(CHECKSUMS)
            older = self._database.execute(f"SELECT {_COLUMNS}, paid FROM answers")
            writer = self._database.cursor()
            for row in older:
                hold(writer.connection, _STAGE, "", row[0], [row])
            self._database.execute(f"PRAGMA user_version = {LAYOUT}")

    def models(self) -> list[str]:
        """The names of the models whose answers are recorded, sorted. Raises BadFile."""
        with self._errors():
            found = [row[0] for row in self._database.execute("SELECT DISTINCT model FROM answers ORDER BY model")]
        if len(found) > 1:  # a damaged row may be the only one of its model
            for model in found:
                for _ in self._rows_of(model):
                    pass
        return found

    def find(self, key: str) -> Recorded | None:
        """The answer recorded under ``key``, or None. Raises DamagedFile if it is damaged or lost."""
        with self._errors():
            query = f"SELECT {_COLUMNS}, paid FROM answers WHERE key = ?"
            row = self._database.execute(query, (key,)).fetchone()
            held = holds(self._database, _STAGE, "", key) if self._verified else None
        if row is None:
            if held is None:
                return None
            if not self._write:
                raise self._damaged(key, "none, though it was recorded")
            _LOG.warning("%s: damaged: the answer under %s is missing and is requested again", self.path, key[:12])
            return None
        self._verify(row, held)
        try:
            return Recorded(_decoded(row[3]), row[6])
        except (ValueError, TypeError, KeyError) as error:  # of a recording without checksums
            raise self._damaged(key, "another text") from error

    def _verify(self, row: Sequence[Any], held: Sum | None) -> None:
        if self._verified:
            sound = held == (1, digest_of([row]))
        else:
            sound = all(isinstance(value, kind) for value, kind in zip(row, _KINDS, strict=True))
        if not sound:
            raise self._damaged(row[0], "another one")

    def _damaged(self, key: str, seen: str) -> DamagedFile:
        return DamagedFile(
            str(self.path),
            expected=f"the answer that was recorded under {key}",
            seen=seen,
            fix=f"delete that answer (DELETE FROM answers WHERE key = '{key}') and run again, which asks for it once more",
        )

    def add(self, request: KeyedRequest, recorded: Recorded, *, paid: bool) -> None:
        """Record an answer, unless the request already has one. ``paid``: whether this run sent it. Raises StorageError."""
        self._add([_row(request, recorded, int(paid))])

    def add_batched(self, answers: Sequence[tuple[KeyedRequest, Recorded]]) -> None:
        """Record the answers of a batch that this run submitted, in one transaction. Raises StorageError."""
        self._add([_row(request, recorded, _BATCHED) for request, recorded in answers])

    def _add(self, rows: Iterable[tuple[Any, ...]]) -> None:
        with self._errors(), self._database:
            for row in rows:
                if self._database.execute(_ADD, row).rowcount:
                    hold(self._database, _STAGE, "", row[0], [row])

    def add_all(self, other: Recording, model: str) -> None:
        """Copy another recording's answers of ``model``, marked as not paid for here. Raises BadFile, StorageError."""
        self._add((*row[:-1], 0) for row in other._rows_of(model))

    def _rows_of(self, model: str) -> Iterator[tuple[Any, ...]]:
        """The rows of a model, verified. A row that is lost is missing here too."""
        with self._errors():
            held = sums_of(self._database, _STAGE, "") if self._verified else {}
            for row in self._database.execute(f"SELECT {_COLUMNS}, paid FROM answers WHERE model = ?", (model,)):
                self._verify(row, held.get(("", row[0])))
                yield row

    def spent(self, model: str) -> Spent:
        """Totals over the answers of ``model`` that this run paid for. Raises BadFile."""
        calls = prompt = completion = characters = 0
        batched = [0, 0, 0]
        seconds = 0.0
        for _, _, request, _, prompt_tokens, completion_tokens, took, paid in self._rows_of(model):
            if not paid:
                continue
            calls += 1
            prompt += prompt_tokens
            completion += completion_tokens
            characters += len(request)
            if paid == _BATCHED:
                batched = [batched[0] + 1, batched[1] + prompt_tokens, batched[2] + completion_tokens]
            else:
                seconds += took
        return Spent(calls, prompt, completion, characters, seconds, *batched)

    def close(self, *, whole: bool = True) -> None:
        """Close the file. ``whole``: merge SQLite's side files into it if possible, so that it can be copied as one file.

        No answer is lost without merging: the side files then hold the latest answers.
        """
        if self._write and whole:
            with contextlib.suppress(sqlite3.OperationalError):  # another process has the file open
                self._database.execute("PRAGMA journal_mode = DELETE")
        self._database.close()


def _layout(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _open_to_read(path: Path) -> sqlite3.Connection:
    """A file without tables counts as an empty recording: its process was killed right after creating the file."""
    database = open_to_read(path, "sqlite_master")
    if database.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
        database.close()
        database = sqlite3.connect(":memory:", check_same_thread=False)
        database.execute(_TABLE)
        database.execute(CHECKSUMS)
        database.execute(f"PRAGMA user_version = {LAYOUT}")
    return database


def _row(request: KeyedRequest, recorded: Recorded, paid: int) -> tuple[Any, ...]:
    response = recorded.response
    tokens = (response.prompt_tokens, response.completion_tokens)
    return (request.key, request.model, request.text, _encoded(response), *tokens, recorded.seconds, paid)


def _encoded(response: Response) -> str:
    """The response as standard JSON, which has no infinity: a log-probability of minus infinity is written as null."""
    logprobs = [
        {token: value if math.isfinite(value) else None for token, value in candidates.items()}
        for candidates in response.logprobs
    ]
    return json.dumps(asdict(response) | {"logprobs": logprobs}, allow_nan=False)


def _decoded(text: str) -> Response:
    answer = json.loads(text)
    logprobs = tuple(
        {token: -math.inf if value is None else value for token, value in candidates.items()}
        for candidates in answer["logprobs"]
    )
    return Response(**answer | {"logprobs": logprobs})
