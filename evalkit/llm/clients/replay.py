"""A client that answers from a recording, and can make one from another client.

What is recorded is never asked again: not in the same run, and with ``cache`` not in any other one that shares it. A
request that was sent is waited for and recorded even when nobody waits for its answer any more; one that still stood in
the queue then is never sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalkit.errors import BadConfig, MissingFile, NotRecorded
from evalkit.llm.accounting.answer_store import Recorded, Recording, Request, Spent
from evalkit.protocols import Client
from evalkit.records import Message, Response

__all__ = ["ReplayClient"]


class ReplayClient:
    """Answers recorded requests; with ``record_from``, asks that client for the others, once each, and records them.

    ``path``: the recording. ``model``: whose answers to replay, where a file holds those of several. ``cache``: a
    recording that is shared with other runs; what either file knows is in both afterwards. The client's ``name`` is the
    model's, so scores made live and replayed are the same records. Raises MissingFile, BadFile, BadConfig (several
    models in the file and none named).
    """

    main_option = "path"

    def __init__(
        self,
        path: str | Path,
        record_from: Client | None = None,
        model: str | None = None,
        cache: str | Path | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self._live = record_from
        self._pending: dict[str, asyncio.Task[Response]] = {}
        self._sent: set[str] = set()
        self.concurrency: int | None = getattr(record_from, "concurrency", None)
        places = self.concurrency  # the queue stands here, where it can be dropped
        self._places: Any = contextlib.nullcontext() if places is None else asyncio.Semaphore(places)
        if record_from is None and not self.path.is_file():
            raise MissingFile(
                str(self.path),
                expected="a file of recorded answers",
                seen="no such file",
                fix="give the path of a recording, or record one first",
            )
        self._recording = Recording(self.path, write=record_from is not None)
        self.name = self._choose_model(model)
        self._cache = None
        if cache is not None and record_from is not None:
            self._cache = Recording(Path(cache).expanduser(), write=True)
            self._cache.add_all(self._recording, self.name)  # after a crash between the two, or a first run without it

    def _choose_model(self, model: str | None) -> str:
        if self._live is not None:
            return self._live.name
        recorded = self._recording.models()
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

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        """The recorded reply; ``options`` as in ``evalkit.protocols.Client.generate``.

        Raises NotRecorded where there is none and no client to ask, StorageError on a full disk.
        """
        request = Request.of(self.name, messages, **options)
        if (response := self._find(request)) is not None:
            return response
        if self._live is None:
            raise NotRecorded(
                f"request {request.key[:12]}",
                expected=f"an answer of {self.name} recorded in {self.path}",
                seen=f"none for: {messages[-1].content[:60]!r}" if messages else "none for an empty request",
                fix="record again with the client that made the recording, or undo the change of prompt, seed or model",
            )
        asked = self._pending.get(request.key)
        if asked is None:
            asked = asyncio.create_task(self._ask(self._live, request, messages, options))
            self._pending[request.key] = asked
            asked.add_done_callback(lambda task: self._forget(request.key, task))
        return await asyncio.shield(asked)  # whoever waits may be cancelled; what was sent is paid for

    def _forget(self, key: str, task: asyncio.Task[Response]) -> None:
        del self._pending[key]
        if not task.cancelled():
            task.exception()  # who waited has heard of it; who was cancelled does not want to

    async def _ask(
        self, live: Client, request: Request, messages: Sequence[Message], options: dict[str, Any]
    ) -> Response:
        async with self._places:
            self._sent.add(request.key)
            started = time.monotonic()
            try:
                response = await live.generate(messages, **options)
            finally:
                self._sent.discard(request.key)
            recorded = Recorded(response, time.monotonic() - started)
            self._recording.add(request, recorded, paid=True)
        if self._cache is not None:
            self._cache.add(request, recorded, paid=True)
        return response

    def record_batched(self, answers: Sequence[tuple[Request, Recorded]]) -> None:
        """Keep answers that came in a batch, whether anybody asks for them or not. Raises StorageError."""
        for recording in filter(None, (self._recording, self._cache)):
            recording.add_batched(answers)

    def _find(self, request: Request) -> Response | None:
        if (found := self._recording.find(request.key)) is not None:
            return found.response
        if self._cache is None or (found := self._cache.find(request.key)) is None:
            return None
        self._recording.add(request, found, paid=False)
        return found.response

    @property
    def in_flight(self) -> int:
        """Requests that were sent and not yet answered."""
        return len(self._sent)

    def spent(self) -> Spent:
        """What the recording's answers of this model took, over all its runs."""
        return self._recording.spent(self.name)

    async def settle(self) -> None:
        """Wait until everything that was sent is answered and recorded; the rest of the queue is dropped.

        Cancelled, it drops what is in flight too.
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
        """Settle, then close the recording and the client behind."""
        try:
            await self.settle()
        finally:
            if (close := getattr(self._live, "close", None)) is not None:
                await close()
            self._recording.close()
            if self._cache is not None:
                self._cache.close()
