"""The Batch API of OpenAI's protocol: files up, batches made, found and looked at, files down.

Everything but the making of a batch may be done twice and is tried again until it works, for as long as anybody answers
now and then. A batch whose making got no clear answer is looked for before it is made again. Knows nothing of what the
files say.
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
METADATA = "evalkit"  # under which our name of a batch stands in what the server keeps of it
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_PATIENCE_S, _LONG_PATIENCE_S = 180.0, 3600.0  # without an answer: before the first one, and after it
_PAGE, _PAGES = 100, 50  # of the list of batches
_EARLIER_S = 3600  # that clocks may differ
_SLOWEST, _LARGEST = 1e5, 1e9  # bytes a second of a connection that is still of use; bytes of a file that comes down
_FILE_BYTES, _LINE_BYTES = 256_000_000, 64_000  # of a file that comes down: in any case, and for each request
_NO_BATCHES = (404, 405, 501)


class TooLarge(Exception):
    """The server takes no file of this size."""


@dataclass(frozen=True, slots=True)
class State:
    """A batch as the server describes it. ``errors``: why it failed as a whole, with the number of a line where told."""

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
    """Of one server. ``window``: within which batches are to be worked off. ``listed_within_s``: so soon after it was made
    a batch is in the list of batches.
    """

    def __init__(
        self, server: Server, redact: Redactor, sdk: Any, timeout_s: float, window: str, listed_within_s: float
    ) -> None:
        self.listed_within_s = listed_within_s
        self._server, self._redact, self._sdk = server, redact, sdk
        self._timeout_s, self.window = timeout_s, window
        self._heard = False  # an answer, ever

    async def close(self) -> None:
        await self._server.close()

    async def look(self) -> None:
        """Find out what kind of server it is. Raises ClientDown."""
        patience = _Patience(self._server.url)
        while True:
            try:
                return await self._server.look()
            except Transient as error:
                await patience.pause(_Unclear(error.reason, error.wait_s, perhaps_done=False), self._heard)

    async def upload(self, name: str, content: bytes) -> str:
        """The file's name at the server. Raises TooLarge, ClientDown."""
        files = self._server.connections.files
        timeout_s = self._timeout_s + len(content) / _SLOWEST
        found = await self._until_done(
            "files", lambda: files.create(file=(f"evalkit-{name}.jsonl", content), purpose="batch"), _named, timeout_s
        )
        return str(found.id)

    async def delete(self, file: str) -> None:
        """Delete a file, where that can be done at once: it is only in the way."""
        with contextlib.suppress(Transient, self._sdk.APIStatusError):
            await self._server.call(self._server.connections.files.delete(file), self._timeout_s)

    async def create(self, name: str, file: str) -> State:
        """Make a batch of an uploaded file, once. Raises TooLarge, ClientDown."""
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
                uncertain |= error.perhaps_done  # whatever is said of later attempts
                await patience.pause(error, self._heard)

    async def find(self, name: str, file: str, since: float | None = None) -> State | None:
        """The batch that was made under our name, or of this file; None where there is none.

        Looks no further back than ``since`` (Unix time, default an hour ago). Raises ClientDown.
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
            if _made_at(last) < earliest and _made_at(last) <= _made_at(first):  # the newest come first, as a rule
                break
            after = {"after": last.id}
        return None

    async def _page(self, after: dict[str, Any]) -> Any:
        return await self._server.connections.batches.list(limit=_PAGE, **after)

    async def state(self, id: str) -> State:
        """How a batch is. Raises ClientDown, for one that is not there as well."""
        retrieve = self._server.connections.batches.retrieve
        return _state(await self._until_done(f"batch {id}", lambda: retrieve(id), _named))

    async def content(self, file: str, requests: int) -> bytes:
        """A file about so many requests. Raises ClientDown, for one that is not there or too large as well."""
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
        """Raises _Unclear for what may be tried again, TooLarge, ClientDown."""
        try:
            answer = await self._server.call(call, timeout_s or self._timeout_s, most_bytes)
            if not sound(answer) or self._tells_the_key(answer):
                raise Transient(f"no answer of the Batch API: {self._redact(str(answer))[:100]}")
        except Oversize as error:
            fix = "ask whoever runs the server; the same command looks again"
            raise ClientDown(
                self._server.url, expected=f"{what} in a size to read", seen=error.reason, fix=fix
            ) from None
        except Transient as error:
            raise _Unclear(error.reason, error.wait_s, perhaps_done=True) from None
        except self._sdk.APIStatusError as error:
            raise self._judged(what, error) from None
        self._heard = True
        return answer

    def _tells_the_key(self, answer: Any) -> bool:
        """In a name, which would be written down."""
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
            self._server.url, expected=f"it to take {what}", seen=reason, fix="see the reason; the same command goes on"
        )


class _Unclear(Exception):
    """No answer, or none that says what happened. ``answered``: the server is there, and said to come back later."""

    def __init__(self, reason: str, wait_s: float | None = None, *, perhaps_done: bool, answered: bool = False) -> None:
        self.reason, self.wait_s, self.perhaps_done, self.answered = reason, wait_s, perhaps_done, answered
        super().__init__(reason)


class _Patience:
    """Growing pauses between attempts at one thing, up to a time without any answer."""

    def __init__(self, server: str) -> None:
        self._server, self._began, self._pause_s = server, time.monotonic(), _FIRST_PAUSE_S
        self._told = False

    async def pause(self, error: _Unclear, heard: bool) -> None:
        """``heard``: the server has answered before. Raises ClientDown when patience is over."""
        reason = error.reason
        if error.answered:
            self._began = time.monotonic()
        if time.monotonic() - self._began > (_LONG_PATIENCE_S if heard else _PATIENCE_S):
            raise ClientDown(
                self._server,
                expected="an answer",
                seen=reason,
                fix="see that the server can be reached; batches go on there, the same command fetches their answers",
            )
        pause_s = max(self._pause_s, error.wait_s or 0.0)
        _LOG.log(
            logging.DEBUG if self._told else logging.INFO, "%s: %s; again in %.0f s", self._server, reason, pause_s
        )
        self._told = True
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        await asyncio.sleep(pause_s)


def _missing(server: str, what: str, seen: str) -> ClientError:
    if what in ("files", "batches"):
        fix = "check the base URL; for a server without the Batch API, use --client openai:MODEL"
        return ClientDown(server, expected="the Batch API (/files and /batches)", seen=seen, fix=fix)
    fix = "use the key that handed it in; to give it up and ask again, delete batches.sqlite in the run folder"
    return ClientDown(server, expected=f"{what}, which this run handed in", seen=seen, fix=fix)


def _named(answer: Any) -> bool:
    return isinstance(getattr(answer, "id", None), str)


def _listed(answer: Any) -> bool:
    return isinstance(getattr(answer, "data", None), list)


def _made_at(batch: Any) -> float:
    at = getattr(batch, "created_at", None)
    return float(at) if isinstance(at, int | float) else math.inf


def _count(value: Any) -> int:
    """0 where a server says what is no number of requests."""
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
