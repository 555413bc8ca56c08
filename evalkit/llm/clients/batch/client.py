"""The client for the Batch API: all requests of a stage are uploaded in one file and answered within a day.

Requests are collected until no more come, cut into batches, submitted and polled. Answers are recorded under the same keys
as those of the client ``openai``, so that either client can resume the other's run. Submitted batches are recorded in a
ledger beside the recording, and are never submitted again. ``probe`` sends the first request of every form by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from evalkit.errors import BadConfig, NoAnswer, RequestRefused
from evalkit.llm.accounting.answer_store import KeyedRequest, Recorded
from evalkit.llm.clients.batch.api import BatchApi, TooLarge
from evalkit.llm.clients.batch.jsonl import cut_batch
from evalkit.llm.clients.batch.ledger import Batch, Ledger
from evalkit.llm.clients.batch.poller import Follower, Result
from evalkit.llm.clients.batch.probe import Probe, left_open
from evalkit.llm.clients.batch.sizing import Room
from evalkit.llm.clients.openai import OpenAIClient
from evalkit.llm.clients.server.dialects import Constraints, Dialect
from evalkit.llm.clients.server.endpoints import expect, is_number
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Message, Response

__all__ = ["OpenAIBatchClient"]

_LOG = logging.getLogger(__name__)
_expect = partial(expect, client="openai-batch")
Record: TypeAlias = Callable[[Sequence[tuple[KeyedRequest, Recorded]]], None]


class OpenAIBatchClient:
    """Sends requests to ``model`` through the Batch API of one server, by default the hosted API of OpenAI.

    ``probe``: whether to send the first request of every form without a batch.
    ``quiet_s``: collected requests are submitted once no new one has come for this time.
    ``look_every_s``: time between two polls of a batch.
    ``max_requests``, ``max_bytes``: limits of one batch; what exceeds them goes into further batches.
    ``max_attempts``: batches that a request goes into before it fails.
    ``window``: the time within which the server completes a batch, as the Batch API spells it.
    ``listed_within_s``: the longest time after its creation until the server lists a batch.
    ``concurrency``: limit of requests that are collected or in batches at the same time.
    The other options are those of the client ``openai``. Raises BadConfig, MissingExtra.
    """

    main_option = "model"
    in_process = True  # the server completes batches without this process
    batched = True

    def __init__(
        self,
        model: str,
        *,
        base_url: str | Sequence[str] | None = None,
        temperature: float | None = 0.0,
        probe: bool = True,
        quiet_s: float = 5.0,
        look_every_s: float = 30.0,
        max_requests: int = 50_000,
        max_bytes: int = 200_000_000,
        max_attempts: int = 4,
        window: str = "24h",
        listed_within_s: float = 30.0,
        concurrency: int = 50_000,
        timeout_s: float = 300.0,
        api_key_env: str = "OPENAI_API_KEY",
        constraints: Constraints = "auto",
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        counts = {"max_requests": max_requests, "max_attempts": max_attempts, "concurrency": concurrency}
        for option, count in counts.items():
            _expect(option, count, is_number(count, 1, int), "a whole number from 1")
        _expect("max_bytes", max_bytes, is_number(max_bytes, 1000, int), "a whole number from 1000")
        times = {"quiet_s": quiet_s, "look_every_s": look_every_s, "listed_within_s": listed_within_s}
        for option, seconds in times.items():
            _expect(option, seconds, is_number(seconds, 0.01), "seconds, a number above 0")
        _expect("probe", probe, isinstance(probe, bool), "true or false")
        _expect("window", window, isinstance(window, str) and window != "", 'a time such as "24h"')
        self._online = OpenAIClient(
            model,
            base_url=base_url,
            temperature=temperature,
            timeout_s=timeout_s,
            api_key_env=api_key_env,
            constraints=constraints,
            extra_body=extra_body,
        )
        self._endpoint = self._online.endpoint
        if len(self._endpoint.urls) > 1:
            raise BadConfig(
                "base URL of client 'openai-batch'",
                expected="one server, which keeps the batches",
                seen=f"{len(self._endpoint.urls)} URLs",
                fix="give one URL, or use --client openai for several servers",
            )
        (self._url,) = self._endpoint.urls
        self.name, self.concurrency = self._endpoint.name, concurrency
        self._dialect: Dialect = self._online.dialects[self._url]
        self._probe_first, self._quiet_s, self._look_every_s = probe, quiet_s, look_every_s
        self._most_requests, self._most_bytes = max_requests, max_bytes
        self._max_attempts, self._timeout_s = max_attempts, timeout_s
        self.window, self._terms = window, (window, listed_within_s)
        self._path: Path | None = None
        self._record: Record = lambda answers: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answers: dict[str, asyncio.Future[Response]] = {}  # by key, what callers await
        self._known: dict[str, Response | Exception] = {}  # by key, results that no caller awaited
        self._waiting: dict[str, KeyedRequest] = {}  # collected, in the order of the calls
        self._batches: dict[str, Batch] = {}  # by name: submitted, or about to be
        self._tasks: set[asyncio.Task[None]] = set()
        self._attempts: Counter[str] = Counter()
        self._left = False
        self._stopped: dict[str, Batch] = {}  # by key of a request: batches that may still be running, unpolled

    def keep_in(self, path: Path, record: Record) -> None:
        """Keep the ledger at ``path``, and call ``record`` with every answer, even if no caller awaits it."""
        self._path, self._record = path, record

    async def generate(
        self,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None = None,
        choices: Sequence[str] | None = None,
        regex: str | None = None,
        logprobs: int = 0,
        seed: int | None = None,
        max_tokens: int,
    ) -> Response:
        """One reply, once its batch has ended. Raises the errors of ``OpenAIClient.generate``, and StorageError."""
        content = GenerateRequest(
            messages, schema=schema, choices=choices, regex=regex, logprobs=logprobs, seed=seed, max_tokens=max_tokens
        )
        request = KeyedRequest.of(self.name, content)
        self._open()
        if self._left:
            raise left_open()
        known = self._known.get(request.key)
        if isinstance(known, Response):
            return known
        if (stopped := self._stopped.get(request.key)) is not None:  # it may be answered by now
            self._resume(stopped)
        elif known is not None:
            raise known
        answer = self._answers.get(request.key)
        if answer is None:
            answer = self._answers[request.key] = asyncio.get_running_loop().create_future()
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio logs it
            if not any(request.key in batch.requests for batch in self._batches.values()):
                self._collect(request)
        return await asyncio.shield(answer)

    def finish(self) -> None:
        """Stop waiting: all callers get NoAnswer. The next command fetches the answers of submitted batches."""
        if self._loop is None or self._left:
            return
        self._left = True
        handed_in = [batch for batch in self._batches.values() if batch.id is not None]
        if handed_in:
            count = sum(len(batch.requests) for batch in handed_in)
            told = (self._url, f"{count:,}", len(handed_in))
            _LOG.warning(
                "%s keeps working on %s requests in batches (%d); the same command fetches their answers", *told
            )
        for key in list(self._answers):
            if key != self._probe.in_flight:  # a request that was sent is paid for
                self._resolve(key, left_open())
        for task in self._tasks:
            if task is not self._submitting or self._probe.in_flight is None:
                task.cancel()
        self._probe.finish()

    async def close(self) -> None:
        """Leave submitted batches to the next command, and close the ledger and the connections."""
        if self._loop is asyncio.get_running_loop():
            self.finish()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._api.close()
            self._ledger.close()
        self._loop = None
        await self._online.close()

    def _open(self) -> None:
        """Open the ledger and the connections for the running event loop, and start polling batches that have not ended."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        self._ledger = Ledger(self._path, self.name, self._url)
        self._probe = Probe(self._online, self._dialect, self._ledger, self._resolve)
        server = self._endpoint.server(self._url, self._dialect, self._timeout_s)
        self._api = BatchApi(server, self._endpoint.redact, self._endpoint.sdk, self._timeout_s, *self._terms)
        self._follower = Follower(
            self._api, self._ledger, self._endpoint, self._url, self._record, look_every_s=self._look_every_s
        )
        self._answers, self._known, self._waiting, self._batches, self._tasks = {}, {}, {}, {}, set()
        self._attempts, self._stopped = Counter(), {}
        self._added, self._ended = asyncio.Event(), asyncio.Event()
        self._left, self._room, self._loop = False, Room(self._most_requests), loop
        for url, count in self._ledger.elsewhere().items():
            told = (f"{count:,}", self.name, url, self._url)
            _LOG.warning("%s requests of %s are in batches at %s; this command uses %s and does not fetch them", *told)
        for batch in self._ledger.open_batches():
            self._batches[batch.name] = batch
            self._start(self._follow(batch))
        self._submitting: asyncio.Task[None] = self._start(self._submit_collected())

    def _resume(self, batch: Batch) -> None:
        """Poll a batch again."""
        for key in batch.requests:
            self._stopped.pop(key, None)
            self._known.pop(key, None)
        self._batches[batch.name] = batch
        self._start(self._follow(batch))

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _collect(self, request: KeyedRequest) -> None:
        self._waiting[request.key] = request
        self._added.set()

    def _resolve(self, key: str, result: Response | Exception) -> None:
        answer = self._answers.pop(key, None)
        self._waiting.pop(key, None)
        if answer is None:
            self._known[key] = result  # a later caller may have looked into the recording too early
        elif isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)

    async def _submit_collected(self) -> None:
        while not self._left:
            await self._added.wait()
            while self._added.is_set() and len(self._waiting) < self._most_requests:
                self._added.clear()
                await asyncio.sleep(self._quiet_s)
            self._added.clear()
            try:
                await self._submit()
            except Exception as error:  # of any class: otherwise the callers would wait for ever
                for key in list(self._waiting):
                    self._resolve(key, error)

    async def _submit(self) -> None:
        """Submit everything that was collected, batch by batch."""
        if self._probe_first:
            await self._probe.run(self._waiting)
            if self._left:
                return
        elif self._dialect.kind is None:
            await self._api.look()
        left = len(self._waiting)  # requests collected meanwhile wait for their own quiet time
        while left > 0:
            while self._room.alone and self._batches:  # the server has no room for a second one
                self._ended.clear()
                await self._ended.wait()
            await asyncio.sleep(self._room.pause_s)
            if not self._waiting:
                return
            dialect = Dialect(self._dialect.kind, set(self._dialect.refused))
            batch = cut_batch(self._waiting, self._endpoint, dialect, self._room.size, self._most_bytes)
            left -= len(batch.requests)
            for key in batch.requests:
                del self._waiting[key]
            await self._submit_batch(batch)

    async def _submit_batch(self, batch: Batch) -> None:
        self._batches[batch.name] = batch
        try:
            self._ledger.write(batch)
            try:
                await self._follower.hand_in(batch)
            except TooLarge as error:
                self._ledger.ended(batch, "too large")
                self._drop(batch)
                self._smaller(batch, str(error))
            else:
                self._start(self._follow(batch))
        except Exception as error:
            self._fail(batch, error)
            raise

    def _smaller(self, batch: Batch, reason: str) -> None:
        """Put the requests of a batch that is too large into smaller ones."""
        if len(batch.requests) == 1:
            (key,) = batch.requests
            fix = "use fewer or shorter examples"
            self._resolve(key, RequestRefused("request", expected="a size that fits a file", seen=reason, fix=fix))
            return
        self._room.too_large(len(batch.requests))
        told = (self._url, len(batch.requests), reason, self._room.size)
        _LOG.warning("%s rejects a batch of %d requests as too large (%s); retrying with %d", *told)
        for request in batch.requests.values():
            self._collect(request)

    async def _follow(self, batch: Batch) -> None:
        """Poll a batch until it has ended, then resolve its requests."""
        try:
            result = await self._follower.follow(batch)
            self._drop(batch)
            self._settle(batch, result)
        except Exception as error:  # of any class: present and later callers must get it
            self._fail(batch, error)

    def _fail(self, batch: Batch, error: Exception) -> None:
        if not any(key in self._answers for key in batch.requests):
            _LOG.warning("batch %d: %s", batch.number, error)
        self._drop(batch)
        for key in batch.requests:
            self._resolve(key, error)

    def _drop(self, batch: Batch) -> None:
        """Poll the batch no more. If it may still be answered, a later call for one of its requests resumes polling."""
        self._batches.pop(batch.name, None)
        self._ended.set()
        if not batch.ended:
            self._stopped |= dict.fromkeys(batch.requests, batch)

    def _settle(self, batch: Batch, result: Result) -> None:
        self._probe.refuse(result.refused)
        for key, settled in result.settled.items():
            self._resolve(key, settled)
        if result.full:
            self._room.full(len(batch.requests))
            told = (self._url, result.full, self._room.size, self._room.pause_s)
            _LOG.warning("%s has no room (%s); next batch: at most %d requests, in %.0f s", *told)
        else:
            self._room.took()
        for key, reason in result.again.items():
            if key not in self._answers:  # requested by an earlier command only
                continue
            self._attempts[key] += reason != ""
            if self._attempts[key] >= self._max_attempts:
                expected = f"an answer in {self._max_attempts} batches"
                fix = "see the reason; the same command retries"
                self._resolve(key, NoAnswer(self._url, expected=expected, seen=reason, fix=fix))
            else:
                self._collect(batch.requests[key])
