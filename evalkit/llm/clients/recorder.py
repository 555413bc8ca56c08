"""The client that records another client's answers, and sends each request only once.

A recorded request is not sent again: not in the same run and, with ``cache``, not in any run that shares that file. An
answer to a request that was sent is awaited and recorded even if its caller was cancelled; a request that is still queued
then is dropped. Writes the recording and the cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalkit.abilities import close_client, concurrency_of
from evalkit.llm.accounting.answer_store import KeyedRequest, Recorded, Recording, Spent
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.protocols import Client
from evalkit.records import Message, Response

__all__ = ["Recorder"]


class Recorder:
    """Answers recorded requests, sends the others to the client ``live`` and records its answers.

    ``path``: the recording; made if it does not exist.
    ``live``: the client that is recorded. The recorder has its ``name`` and ``concurrency``.
    ``cache``: a recording shared with other runs. An answer that is in one of the two files is copied to the other.

    Raises BadFile, StorageError.
    """

    def __init__(self, path: str | Path, live: Client, cache: str | Path | None = None) -> None:
        self.path = Path(path).expanduser()
        self.name = live.name
        self.concurrency = concurrency_of(live)
        self._live = live
        self._pending: dict[str, asyncio.Task[Response]] = {}
        self._sent: set[str] = set()
        # requests above the concurrency limit wait here, where they can still be dropped
        self._slots: Any = contextlib.nullcontext() if self.concurrency is None else asyncio.Semaphore(self.concurrency)
        self._recording = Recording(self.path, write=True)
        self._cache = None
        if cache is not None:
            self._cache = Recording(Path(cache).expanduser(), write=True)
            # the cache lacks answers after a crash between the two writes, or if an earlier run had no cache
            self._cache.add_all(self._recording, self.name)

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        """The recorded reply, or else the live client's; ``options`` as in ``evalkit.protocols.Client.generate``.

        Raises what the live client raises, BadFile, StorageError.
        """
        content = GenerateRequest(messages, **options)
        request = KeyedRequest.of(self.name, content)
        if (response := self._find(request)) is not None:
            return response
        task = self._pending.get(request.key)
        if task is None:
            task = asyncio.create_task(self._send(request, content))
            self._pending[request.key] = task
            task.add_done_callback(lambda done: self._forget(request.key, done))
        return await asyncio.shield(task)  # the caller may be cancelled, but a request that was sent is paid for

    def _forget(self, key: str, task: asyncio.Task[Response]) -> None:
        del self._pending[key]
        if not task.cancelled():
            task.exception()  # marks it as retrieved: else asyncio logs it if every caller was cancelled

    async def _send(self, request: KeyedRequest, content: GenerateRequest) -> Response:
        async with self._slots:
            self._sent.add(request.key)
            started = time.monotonic()
            try:
                response = await self._live.generate(content.messages, **content.options())
            finally:
                self._sent.discard(request.key)
            recorded = Recorded(response, time.monotonic() - started)
            self._recording.add(request, recorded, paid=True)
        if self._cache is not None:
            self._cache.add(request, recorded, paid=True)
        return response

    def record_batched(self, answers: Sequence[tuple[KeyedRequest, Recorded]]) -> None:
        """Record answers of a batch, including those that no caller requested. Raises StorageError."""
        for recording in filter(None, (self._recording, self._cache)):
            recording.add_batched(answers)

    def _find(self, request: KeyedRequest) -> Response | None:
        if (recorded := self._recording.find(request.key)) is not None:
            return recorded.response
        if self._cache is None or (recorded := self._cache.find(request.key)) is None:
            return None
        self._recording.add(request, recorded, paid=False)
        return recorded.response

    @property
    def in_flight(self) -> int:
        """The number of requests that were sent and are not answered yet."""
        return len(self._sent)

    def spent(self) -> Spent:
        """What the recorded answers of this model cost, over all commands that wrote to the recording."""
        return self._recording.spent(self.name)

    async def settle(self) -> None:
        """Drop queued requests and wait until everything in flight is answered and recorded.

        If cancelled, drops what is in flight too.
        """
        for key, task in list(self._pending.items()):
            if key not in self._sent:
                task.cancel()
        try:
            while self._pending:
                await asyncio.gather(*self._pending.values(), return_exceptions=True)
        finally:
            for task in list(self._pending.values()):
                task.cancel()

    async def close(self) -> None:
        """Settle, then close the live client, the recording and the cache."""
        try:
            await self.settle()
        finally:
            await close_client(self._live)
            self._recording.close()
            if self._cache is not None:
                self._cache.close()
