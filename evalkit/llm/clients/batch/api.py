"""The Batch API of OpenAI's protocol: upload files, create, find and poll batches, download files.

Every call except creating a batch can safely be repeated, and is retried until it succeeds or the server has been silent
for too long. If creating a batch got no clear answer, the server's list of batches is searched before creating it again.
Does not know the content of the files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from evalkit.errors import ClientDown, ClientError
from evalkit.llm.clients.server.connection import REPLY_BYTES, Oversize, Server
from evalkit.llm.clients.server.failures import Refusal, Transient, judge_failure
from evalkit.llm.clients.server.keys import Redactor

__all__ = ["ENDED", "BatchApi", "State", "TooLarge"]

_LOG = logging.getLogger(__name__)
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_GOING_ON = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
METADATA = "evalkit"  # field of a batch's metadata that holds the name we gave it
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_PATIENCE_S, _LONG_PATIENCE_S = (
    180.0,
    3600.0,
)  # how long to retry a silent server: before its first answer, and after it
_PAGE, _PAGES = 100, 50  # batches per page of the server's list; pages that are read at most
_EARLIER_S = 3600  # allowance for a server clock that differs from ours
_SLOWEST, _LARGEST = 1e5, 1e9  # for the timeout of a transfer: bytes per second at worst, bytes of a downloaded file
_FILE_BYTES, _LINE_BYTES = 256_000_000, 64_000  # size limit of a downloaded file: a base, and an allowance per request
_NO_BATCHES = (404, 405, 501)


class TooLarge(Exception):
    """The server rejects a file of this size."""


@dataclass(frozen=True, slots=True)
class State:
    """A batch as the server describes it.

    ``status``: one of the protocol's, else "unknown".
    ``completed``, ``failed``: numbers of requests.
    ``errors``: why the batch failed as a whole; the line is None if the server names none.
    """

    id: str
    status: str
    output_file: str | None
    error_file: str | None
    completed: int
    failed: int
    errors: tuple[tuple[str, str, int | None], ...]  # code, message, line (from 1)

    @property
    def done(self) -> int:
        return self.completed + self.failed


class BatchApi:
    """The Batch API of one server.

    ``timeout_s``: of one attempt.
    ``window``: the time within which the server should complete a batch.
    ``listed_within_s``: the longest time after its creation until the server lists a batch.
    """

    def __init__(
        self, server: Server, redact: Redactor, sdk: Any, timeout_s: float, window: str, listed_within_s: float
    ) -> None:
        self.listed_within_s = listed_within_s
        self._server, self._redact, self._sdk = server, redact, sdk
        self._timeout_s, self.window = timeout_s, window
        self._heard = False  # whether the server has ever answered

    async def close(self) -> None:
        await self._server.close()

    async def look(self) -> None:
        """Find out which kind of server it is. Raises ClientDown."""
        patience = _Patience(self._server.url)
        while True:
            try:
                return await self._server.look()
            except Transient as error:
                await patience.pause(_Unclear(error.reason, error.wait_s, perhaps_done=False), self._heard)

    async def upload(self, name: str, content: bytes) -> str:
        """Upload a file and return the server's id for it. Raises TooLarge, ClientDown."""
        files = self._server.connections.files
        timeout_s = self._timeout_s + len(content) / _SLOWEST
        found = await self._until_done(
            "files", lambda: files.create(file=(f"evalkit-{name}.jsonl", content), purpose="batch"), _named, timeout_s
        )
        return str(found.id)

    async def delete(self, file: str) -> None:
        """Delete a file in a single attempt. A failure is ignored: a file that stays only takes up space."""
        with contextlib.suppress(Transient, self._sdk.APIStatusError):
            await self._server.call(self._server.connections.files.delete(file), self._timeout_s)

    async def create(self, name: str, file: str) -> State:
        """Create a batch of an uploaded file, and never a second one. Raises TooLarge, ClientDown."""
        create = self._server.connections.batches.create
        patience, uncertain = _Patience(self._server.url), False
        while True:
            if uncertain:
                await asyncio.sleep(self.listed_within_s)
                if (found := await self.find(name, file)) is not None:
                    return found
            try:
                made = await self._once(
                    "batches",
                    create(
                        input_file_id=file,
                        endpoint="/v1/chat/completions",
                        completion_window=self.window,
                        metadata={METADATA: name},
                    ),
                    _named,
                )
                return _state(made)
            except _Unclear as error:
                uncertain |= error.perhaps_done  # and stays so, whatever later attempts return
                await patience.pause(error, self._heard)

    async def find(self, name: str, file: str, since: float | None = None) -> State | None:
        """The batch that was created under our ``name`` or from this file; None if the server lists no such batch.

        Searches back to one hour before ``since`` (Unix time, default now). Raises ClientDown.
        """
        earliest = (time.time() if since is None else since) - _EARLIER_S
        after: dict[str, Any] = {}
        for _ in range(_PAGES):
            listed = await self._until_done("batches", partial(self._page, after), _listed)
            rows = [batch for batch in listed.data if _named(batch)]
            for batch in rows:
                metadata = getattr(batch, "metadata", None)
                ours = isinstance(metadata, dict) and metadata.get(METADATA) == name
                if ours or getattr(batch, "input_file_id", None) == file:
                    return _state(batch)
            first, last = (rows[0], rows[-1]) if rows else (None, None)
            if last is None or not getattr(listed, "has_more", False):
                break
            if _made_at(last) < earliest and _made_at(last) <= _made_at(first):  # most servers list the newest first
                break
            after = {"after": last.id}
        return None

    async def _page(self, after: dict[str, Any]) -> Any:
        return await self._server.connections.batches.list(limit=_PAGE, **after)

    async def state(self, id: str) -> State:
        """The state of a batch. Raises ClientDown, also if the server does not know the batch."""
        retrieve = self._server.connections.batches.retrieve
        return _state(await self._until_done(f"batch {id}", lambda: retrieve(id), _named))

    async def content(self, file: str, requests: int) -> bytes:
        """Download a file with results of ``requests`` requests. Raises ClientDown, also if it is missing or too large."""
        read = self._server.connections.files.content
        found = await self._until_done(
            f"file {file}",
            lambda: read(file),
            lambda one: hasattr(one, "content"),
            self._timeout_s + _LARGEST / _SLOWEST,
            _FILE_BYTES + _LINE_BYTES * requests,
        )
        return bytes(found.content)

    async def _until_done(
        self,
        what: str,
        call: Callable[[], Awaitable[Any]],
        sound: Callable[[Any], bool],
        timeout_s: float | None = None,
        most_bytes: int = REPLY_BYTES,
    ) -> Any:
        patience = _Patience(self._server.url)
        while True:
            try:
                return await self._once(what, call(), sound, timeout_s, most_bytes)
            except _Unclear as error:
                await patience.pause(error, self._heard)

    async def _once(
        self,
        what: str,
        call: Awaitable[Any],
        sound: Callable[[Any], bool],
        timeout_s: float | None = None,
        most_bytes: int = REPLY_BYTES,
    ) -> Any:
        """One attempt. Raises _Unclear if it may be retried, TooLarge, ClientDown."""
        try:
            answer = await self._server.call(call, timeout_s or self._timeout_s, most_bytes)
            if not sound(answer) or self._tells_the_key(answer):
                raise Transient(f"not an answer of the Batch API: {self._redact(str(answer))[:100]}")
        except Oversize as error:
            fix = "ask the operator of the server; the same command resumes"
            raise ClientDown(
                self._server.url, expected=f"{what} of a readable size", seen=error.reason, fix=fix
            ) from None
        except Transient as error:
            raise _Unclear(error.reason, error.wait_s, perhaps_done=True) from None
        except self._sdk.APIStatusError as error:
            raise self._judged(what, error) from None
        self._heard = True
        return answer

    def _tells_the_key(self, answer: Any) -> bool:
        """Whether the API key occurs in an id, which would be written to the ledger and the log."""
        rows = getattr(answer, "data", None)
        told = [answer, *(rows if isinstance(rows, list) else ())]
        names = [getattr(one, name, None) for one in told for name in ("id", "output_file_id", "error_file_id")]
        return any(isinstance(name, str) and self._redact(name) != name for name in names)

    def _judged(self, what: str, error: Any) -> Exception:
        status = int(error.status_code)
        failure = judge_failure(error, self._server.url, (), self._redact)
        said = self._redact(" ".join(str(error.body or error.message).split()))[:200]
        if status == 413 or (status == 400 and "too large" in said.lower()):
            return TooLarge(said)
        if status in _NO_BATCHES:
            return _missing(self._server.url, what, f"status {status}: {said}")
        if isinstance(failure, Transient):
            self._heard = True
            return _Unclear(failure.reason, failure.wait_s, perhaps_done=status != 429, answered=status < 500)
        reason = failure.reason if isinstance(failure, Refusal) else failure.seen
        if isinstance(failure, ClientDown):
            return failure
        return ClientDown(
            self._server.url,
            expected=f"it to accept {what}",
            seen=reason,
            fix="see the reason; the same command resumes",
        )


class _Unclear(Exception):
    """No answer, or one that does not say what happened.

    ``wait_s``: seconds to wait that the server asks for.
    ``perhaps_done``: whether the server may have carried out the call.
    ``answered``: whether the server is up and only asks to retry later.
    """

    def __init__(self, reason: str, wait_s: float | None = None, *, perhaps_done: bool, answered: bool = False) -> None:
        self.reason, self.wait_s, self.perhaps_done, self.answered = reason, wait_s, perhaps_done, answered
        super().__init__(reason)


class _Patience:
    """Growing pauses between the attempts of one call, until the server has been silent for too long."""

    def __init__(self, server: str) -> None:
        self._server, self._began, self._pause_s = server, time.monotonic(), _FIRST_PAUSE_S
        self._told = False

    async def pause(self, error: _Unclear, heard: bool) -> None:
        """Wait before the next attempt. ``heard``: the server has answered before, so wait for it longer.

        Raises ClientDown if the server has been silent for too long.
        """
        reason = error.reason
        if error.answered:
            self._began = time.monotonic()
        if time.monotonic() - self._began > (_LONG_PATIENCE_S if heard else _PATIENCE_S):
            raise ClientDown(
                self._server,
                expected="an answer",
                seen=reason,
                fix="check that the server can be reached; batches continue there, the same command fetches their answers",
            )
        pause_s = max(self._pause_s, error.wait_s or 0.0)
        _LOG.log(
            logging.DEBUG if self._told else logging.INFO, "%s: %s; retrying in %.0f s", self._server, reason, pause_s
        )
        self._told = True
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        await asyncio.sleep(pause_s)


def _missing(server: str, what: str, seen: str) -> ClientError:
    if what in ("files", "batches"):
        fix = "check the base URL; if the server has no Batch API, use --client openai:MODEL"
        return ClientDown(server, expected="the Batch API (/files and /batches)", seen=seen, fix=fix)
    fix = "use the API key that submitted it; to give it up and send it again, delete batches.sqlite in the run folder"
    return ClientDown(server, expected=f"{what}, which this run submitted", seen=seen, fix=fix)


def _named(answer: Any) -> bool:
    return isinstance(getattr(answer, "id", None), str)


def _listed(answer: Any) -> bool:
    return isinstance(getattr(answer, "data", None), list)


def _made_at(batch: Any) -> float:
    at = getattr(batch, "created_at", None)
    return float(at) if isinstance(at, int | float) else math.inf


def _count(value: Any) -> int:
    """A number of requests; 0 if the server's value is not a plausible one."""
    return int(value) if isinstance(value, int | float) and 0 < value < 1e12 else 0


def _file(name: Any) -> str | None:
    return name if isinstance(name, str) and name else None


def _state(batch: Any) -> State:
    counts = getattr(batch, "request_counts", None)
    errors = getattr(getattr(batch, "errors", None), "data", None)
    status = getattr(batch, "status", None)
    return State(
        id=str(batch.id),
        status=status if status in ENDED | _GOING_ON else "unknown",
        output_file=_file(getattr(batch, "output_file_id", None)),
        error_file=_file(getattr(batch, "error_file_id", None)),
        completed=_count(getattr(counts, "completed", 0)),
        failed=_count(getattr(counts, "failed", 0)),
        errors=tuple(
            (str(getattr(one, "code", None)), str(getattr(one, "message", None)), getattr(one, "line", None))
            for one in (errors if isinstance(errors, list) else ())
        ),
    )
