"""The recording: a SQLite file with one row per answered request, keyed by a hash of the request's content.

Every answer is committed as soon as it arrives, so a crash loses nothing that was paid for. The file holds no API keys and
no headers, because requests do not contain them. Knows no client.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evalkit.errors import BadFile, StorageError
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Response
from evalkit.util.sqlite import open_to_read, open_to_write

__all__ = ["KeyedRequest", "Recorded", "Recording", "Spent"]

_TABLE = """CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, request TEXT NOT NULL, response TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, seconds REAL NOT NULL, paid INTEGER NOT NULL
    ) WITHOUT ROWID"""
_COLUMNS = "key, model, request, response, prompt_tokens, completion_tokens, seconds"
# paid: 0 if the answer was copied from another recording, 1 if this run sent the request, 2 if it sent it in a batch
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
    """

    def __init__(self, path: Path, *, write: bool) -> None:
        self.path = path
        self._write = write
        try:
            if write:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._database = open_to_write(path)
                with self._database:
                    self._database.execute(_TABLE)
            else:
                self._database = _open_to_read(path)
            self._database.execute(f"SELECT {_COLUMNS} FROM answers LIMIT 1")
        except OSError as error:
            raise self._storage_error(error) from error
        except sqlite3.DatabaseError as error:
            if write and isinstance(error, sqlite3.OperationalError) and "no such" not in str(error):
                raise self._storage_error(error) from error
            raise BadFile(
                str(path),
                expected="a recording made by the replay client",
                seen=str(error),
                fix="give the path of a recording, or record one first",
            ) from error

    def models(self) -> list[str]:
        """The names of the models whose answers are recorded, sorted."""
        return [row[0] for row in self._database.execute("SELECT DISTINCT model FROM answers ORDER BY model")]

    def find(self, key: str) -> Recorded | None:
        """The answer recorded under ``key``, or None. Raises BadFile if the row is damaged."""
        row = self._database.execute("SELECT response, seconds FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        try:
            return Recorded(_decoded(row[0]), row[1])
        except (ValueError, TypeError, KeyError) as error:
            raise BadFile(
                str(self.path),
                expected=f"a recorded answer under the key {key[:12]}…",
                seen="a damaged row",
                fix="delete that row from the table answers",
            ) from error

    def add(self, request: KeyedRequest, recorded: Recorded, *, paid: bool) -> None:
        """Record an answer, unless the request already has one. ``paid``: whether this run sent it. Raises StorageError."""
        self._add([_row(request, recorded, int(paid))])

    def add_batched(self, answers: Sequence[tuple[KeyedRequest, Recorded]]) -> None:
        """Record the answers of a batch that this run submitted, in one transaction. Raises StorageError."""
        self._add([_row(request, recorded, 2) for request, recorded in answers])

    def _add(self, rows: Sequence[tuple[Any, ...]]) -> None:
        try:
            with self._database:
                self._database.executemany(_ADD, rows)
        except sqlite3.OperationalError as error:
            raise self._storage_error(error) from error

    def add_all(self, other: Recording, model: str) -> None:
        """Copy another recording's answers of ``model``, marked as not paid for here. Raises StorageError."""
        rows = other._database.execute(f"SELECT {_COLUMNS}, 0 FROM answers WHERE model = ?", (model,))
        try:
            with self._database:
                self._database.executemany(_ADD, rows)
        except sqlite3.OperationalError as error:
            raise self._storage_error(error) from error

    def spent(self, model: str) -> Spent:
        """Totals over the answers of ``model`` that this run paid for."""
        row = self._database.execute(
            "SELECT count(*), total(prompt_tokens), total(completion_tokens), total(length(request)), "
            "total(seconds * (paid != 2)), total(paid = 2), total(prompt_tokens * (paid = 2)), "
            "total(completion_tokens * (paid = 2)) FROM answers WHERE paid AND model = ?",
            (model,),
        ).fetchone()
        calls, prompt, completion, characters, seconds, *batched = row
        return Spent(int(calls), int(prompt), int(completion), int(characters), seconds, *map(int, batched))

    def _storage_error(self, error: Exception) -> StorageError:
        return StorageError(
            str(self.path),
            expected="a file that can be written",
            seen=str(error),
            fix="free space on the disk, or record to another folder",
        )

    def close(self, *, whole: bool = True) -> None:
        """Close the file. ``whole``: merge SQLite's side files into it if possible, so that it can be copied as one file.

        No answer is lost without merging: the side files then hold the latest answers.
        """
        if self._write and whole:
            with contextlib.suppress(sqlite3.OperationalError):  # another process has the file open
                self._database.execute("PRAGMA journal_mode = DELETE")
        self._database.close()


def _open_to_read(path: Path) -> sqlite3.Connection:
    """A file without tables counts as an empty recording: its process was killed right after creating the file."""
    database = open_to_read(path, "sqlite_master")
    if database.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
        database.close()
        database = sqlite3.connect(":memory:", check_same_thread=False)
        database.execute(_TABLE)
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
