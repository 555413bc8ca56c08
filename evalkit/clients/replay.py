"""A client that answers from a recording, and can make one from another client.

A recording is one SQLite file: per request, the request itself, the response, and a key that is the BLAKE2b hash of the
request's canonical JSON (messages, schema, choices, logprobs, seed, max_tokens, model name). Every answer is committed
as soon as it is there, so a crash loses nothing that was paid for. Holds no keys or headers: those never reach a request.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evalkit.errors import BadConfig, BadFile, MissingFile, NotRecorded, StorageError
from evalkit.protocols import Client
from evalkit.records import Message, Response

__all__ = ["ReplayClient", "request_key"]

_TABLE = """CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, request TEXT NOT NULL, response TEXT NOT NULL
) WITHOUT ROWID"""


def request_key(
    model: str,
    messages: Sequence[Message],
    *,
    schema: Mapping[str, Any] | None,
    choices: Sequence[str] | None,
    logprobs: int,
    seed: int | None,
    max_tokens: int,
) -> tuple[str, str]:
    """The key of a request and its canonical JSON: sorted keys, no spaces, UTF-8."""
    request = {
        "model": model,
        "messages": [asdict(message) for message in messages],
        "schema": schema,
        "choices": None if choices is None else list(choices),
        "logprobs": logprobs,
        "seed": seed,
        "max_tokens": max_tokens,
    }
    text = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest(), text


class ReplayClient:
    """Answers recorded requests; with ``record_from``, asks that client for the others, once each, and records them.

    ``path``: the recording. ``model``: whose answers to replay, where a file holds those of several. The client's
    ``name`` is the model's, so scores made live and replayed are the same records. Raises MissingFile, BadFile,
    BadConfig (several models in the file and none named).
    """

    def __init__(self, path: str | Path, record_from: Client | None = None, model: str | None = None) -> None:
        self.path = Path(path)
        self._live = record_from
        self._pending: dict[str, asyncio.Future[Response]] = {}
        if record_from is None and not self.path.is_file():
            raise MissingFile(
                str(self.path),
                expected="a file of recorded answers",
                seen="no such file",
                fix="give the path of a recording, or record one first",
            )
        try:
            self._database = self._open()
            recorded = [row[0] for row in self._database.execute("SELECT DISTINCT model FROM answers ORDER BY model")]
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and record_from is not None:
                raise self._storage_error(error) from error
            raise BadFile(
                str(self.path),
                expected="a recording made by the replay client",
                seen=str(error),
                fix="give the path of a recording, or record one first",
            ) from error
        self.name = self._choose_model(model, recorded)

    def _open(self) -> sqlite3.Connection:
        if self._live is None:
            return sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
        database = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
        with database:
            database.execute(_TABLE)
        return database

    def _choose_model(self, model: str | None, recorded: Sequence[str]) -> str:
        if self._live is not None:
            return self._live.name
        if model is None and len(recorded) == 1:
            return recorded[0]
        if model is None or model not in recorded:
            raise BadConfig(
                str(self.path),
                expected=f"one of the recorded models: {', '.join(recorded) or '(the recording is empty)'}",
                seen="no model named" if model is None else repr(model),
                fix="pass model=…, one of the recorded ones",
            )
        return model

    async def generate(
        self,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None = None,
        choices: Sequence[str] | None = None,
        logprobs: int = 0,
        seed: int | None = None,
        max_tokens: int,
    ) -> Response:
        """The recorded reply. Raises NotRecorded where there is none and no client to ask, StorageError on a full disk."""
        key, request = request_key(
            self.name,
            messages,
            schema=schema,
            choices=choices,
            logprobs=logprobs,
            seed=seed,
            max_tokens=max_tokens,
        )
        if (response := self._recorded(key)) is not None:
            return response
        if self._live is None:
            raise NotRecorded(
                f"request {key[:12]}",
                expected=f"an answer of {self.name} recorded in {self.path}",
                seen=f"none for: {messages[-1].content[:60]!r}" if messages else "none for an empty request",
                fix="record again with the client that made the recording, or undo the change of prompt, seed or model",
            )
        if (pending := self._pending.get(key)) is not None:
            return await asyncio.shield(pending)
        asked = asyncio.ensure_future(
            self._live.generate(
                messages, schema=schema, choices=choices, logprobs=logprobs, seed=seed, max_tokens=max_tokens
            )
        )
        self._pending[key] = asked
        try:
            response = await asked
            self._record(key, request, response)
        finally:
            del self._pending[key]
        return response

    def _recorded(self, key: str) -> Response | None:
        row = self._database.execute("SELECT response FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        answer = json.loads(row[0])
        return Response(**answer | {"logprobs": tuple(answer["logprobs"])})

    def _record(self, key: str, request: str, response: Response) -> None:
        answer = asdict(response) | {"logprobs": [dict(token) for token in response.logprobs]}
        row = (key, self.name, request, json.dumps(answer, ensure_ascii=True))
        try:
            with self._database:
                self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", row)
        except sqlite3.OperationalError as error:
            raise self._storage_error(error) from error

    def _storage_error(self, error: sqlite3.Error) -> StorageError:
        return StorageError(
            str(self.path),
            expected="a file that can be written",
            seen=str(error),
            fix="free space on the disk, or record to another folder",
        )

    def close(self) -> None:
        """Close the file. Nothing is lost without it."""
        self._database.close()
