"""The client for servers that speak the chat-completions protocol: a hosted API, vLLM's server, or several servers.

Keeps many requests in flight, over all its base URLs together. A request goes to the least busy healthy server
(``breaker`` decides which are) as soon as the rate limits of the account allow (``limits``). Transient failures are
retried after growing, jittered pauses, or after the pause that the server asks for; other failures are not retried. The
API key comes from the environment and is sent to the servers only. Writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from evalkit.errors import ClientDown, ClientError, NoAnswer, require
from evalkit.llm.clients.server.connection import Server
from evalkit.llm.clients.server.dialects import (
    CONSTRAINTS,
    REMOVABLE,
    Constraints,
    Dialect,
    Form,
    MalformedReply,
)
from evalkit.llm.clients.server.endpoints import Endpoint, expect, is_number
from evalkit.llm.clients.server.failures import Refusal, Transient, judge_failure, may_be_a_parameter, signature
from evalkit.llm.clients.server.limits import Limits, Permit
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Message, Response

__all__ = ["OpenAIClient"]

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_TOLD_PAUSE_S = 20.0  # a pause that a server asks for is logged as a warning if it is longer than this
_PATIENCE_S = 180.0  # if no request has been answered for this long, a request without any reply is not retried
_BAD_NEWS_S = 1.0  # after a ClientDown, requests made up to this much later fail with the same error


class OpenAIClient:
    """Sends requests to ``model``.

    ``base_url``: one URL, or several that serve the same model. Default: the hosted API of OpenAI.
    ``temperature``: None leaves it to the server.
    ``concurrency``: limit of requests in flight, over all servers.
    ``requests_per_minute``, ``tokens_per_minute``: rate limits of the account; tokens of prompts and replies together.
    ``timeout_s``: of one attempt, from sending to the last byte.
    ``max_attempts``: per request.
    ``api_key_env``: the environment variable that holds the key.
    ``constraints``: how the server is told to constrain output; "auto" detects which way it supports.
    ``extra_body``: further fields of every request.

    Raises BadConfig, MissingExtra.
    """

    main_option = "model"

    def __init__(
        self,
        model: str,
        *,
        base_url: str | Sequence[str] | None = None,
        temperature: float | None = 0.0,
        concurrency: int = 64,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        timeout_s: float = 300.0,
        max_attempts: int = 10,
        api_key_env: str = "OPENAI_API_KEY",
        constraints: Constraints = "auto",
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        self._tenacity = require("tenacity", "api")
        expect("concurrency", concurrency, is_number(concurrency, 1, int), "a whole number from 1")
        expect("max_attempts", max_attempts, is_number(max_attempts, 1, int), "a whole number from 1")
        expect("timeout_s", timeout_s, is_number(timeout_s, 0.01), "seconds, a number above 0")
        for option, rate in (("requests_per_minute", requests_per_minute), ("tokens_per_minute", tokens_per_minute)):
            expect(option, rate, rate is None or is_number(rate, 0.01), "a number above 0")
        expect("constraints", constraints, constraints in CONSTRAINTS, f"one of {', '.join(CONSTRAINTS)}")
        self.endpoint = Endpoint.of(
            model, base_url=base_url, temperature=temperature, api_key_env=api_key_env, extra_body=extra_body
        )
        self.dialects = {url: Dialect(None if constraints == "auto" else constraints) for url in self.endpoint.urls}
        self.name = self.endpoint.name
        self.concurrency, self._rates = concurrency, (requests_per_minute, tokens_per_minute)
        self._timeout_s, self._max_attempts = timeout_s, max_attempts
        self._servers: list[Server] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last_success = self._told_until = 0.0
        self._down: ClientDown | None = None  # raised for requests made before ``_down_until``
        self._down_until = 0.0
        self._finishing = False
        self._told: set[str] = set()  # rejected parameters that a warning has named

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
        """One reply. Raises ContextOverflow, RequestRefused, NoAnswer, ClientDown."""
        request = GenerateRequest(
            messages, schema=schema, choices=choices, regex=regex, logprobs=logprobs, seed=seed, max_tokens=max_tokens
        )
        self._connect()
        asked = time.monotonic()
        async with self._gate:
            try:
                return await self._until_answered(request, asked)
            except ClientDown as error:
                if asked >= self._down_until:
                    self._down, self._down_until = error, time.monotonic() + _BAD_NEWS_S
                    self._bad_news.set()  # wakes the requests that pause now …
                    self._bad_news.clear()  # … but none that pause later
                    self._limits.dismiss()
                raise

    def finish(self) -> None:
        """Send nothing more and retry nothing. Requests in flight are awaited; the others fail with NoAnswer."""
        self._finishing = True
        if self._servers:
            self._bad_news.set()
            self._limits.dismiss()

    async def close(self) -> None:
        """Close the connections."""
        servers, self._servers = self._servers, []
        if self._loop is asyncio.get_running_loop():  # connections of another loop were closed with it
            await asyncio.gather(*(server.close() for server in servers))

    def _connect(self) -> None:
        """Open connections for the running event loop, unless it has some."""
        loop = asyncio.get_running_loop()
        if self._servers and self._loop is loop:
            return
        if self._loop is not None:  # a new event loop: ``finish`` applied to the old one
            self._finishing = False
        self._loop, self._down_until, self._bad_news = loop, 0.0, asyncio.Event()
        self._gate = asyncio.Semaphore(self.concurrency)
        self._limits = Limits(*self._rates, clock=loop.time)
        self._servers = [self.endpoint.server(url, self.dialects[url], self._timeout_s) for url in self.dialects]

    async def _until_answered(self, request: GenerateRequest, asked: float) -> Response:
        tenacity, started = self._tenacity, time.monotonic()
        jittered = tenacity.wait_random_exponential(multiplier=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S)

        def pause(state: Any) -> float:
            """At least the pause that the server asks for, plus jitter so that requests do not all return at once."""
            asked, own = state.outcome.exception().wait_s, float(jittered(state))
            return own if asked is None else max(own, asked + min(own, 0.1 * asked))

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self._max_attempts),
                lambda state: self._finishing,
                lambda state: self._is_silent(state.outcome.exception(), started),
            ),
            wait=pause,
            retry=tenacity.retry_if_exception_type(Transient),
            sleep=self._pause,
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            response: Response = await retrying(self._attempt, request, asked)
        except Transient as error:
            raise self._gave_up(error, started) from None
        self._last_success = time.monotonic()
        return response

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._bad_news.wait(), seconds)

    def _tell(self, state: Any) -> None:
        """Log a pause: a long one that a server asked for as a warning, once while it lasts; others at level DEBUG."""
        error, pause_s, now = state.outcome.exception(), state.next_action.sleep, time.monotonic()
        level = logging.DEBUG
        if error.wait_s is not None and pause_s > _TOLD_PAUSE_S and now >= self._told_until:
            level, self._told_until = logging.WARNING, now + pause_s
        _LOG.log(level, "attempt %d: %s; retrying in %.1f s", state.attempt_number, error.reason, pause_s)

    def _is_silent(self, error: Transient, started: float) -> bool:
        """Whether there was no reply, and no request has been answered for so long that retrying is pointless."""
        return error.silent and time.monotonic() - max(started, self._last_success) > _PATIENCE_S

    def _gave_up(self, error: Transient, started: float) -> ClientError:
        where = ", ".join(server.url for server in self._servers)
        again = "the same command resumes"
        fix = f"check that the server is up, lower concurrency or raise timeout_s; {again}"
        if self._last_success < started or self._is_silent(error, started):
            mend = fix if error.silent else f"see the reason, and check the base URL; {again}"
            return ClientDown(where, expected="an answer to any request", seen=self._reasons(error), fix=mend)
        return NoAnswer(where, expected=f"an answer in {self._max_attempts} attempts", seen=error.reason, fix=fix)

    def _reasons(self, error: Transient) -> str:
        """The reason of the failure; with several servers, the reason of each that is known to fail."""
        failing = [server for server in self._servers if server.breaker.is_open]
        if len(self._servers) == 1 or not failing:
            return error.reason
        return "; ".join(f"{server.url}: {server.breaker.reason}" for server in failing)

    async def _attempt(self, request: GenerateRequest, asked: float) -> Response:
        """Send to one server, and again at once if it only rejects a parameter. Raises Transient, ClientError."""
        while True:
            permit = await self._permit(request, asked)
            server = self._choose()
            probing = server.breaker.begin()
            server.in_flight += 1
            try:
                await server.look()
                if (response := await self._ask(server, request, permit)) is not None:
                    return response
            finally:
                server.in_flight -= 1
                if probing:
                    server.breaker.end()
                self._limits.leave(permit)

    async def _permit(self, request: GenerateRequest, asked: float) -> Permit:
        """Wait until the rate limits allow the request. Raises ClientDown or Transient if nothing is sent any more."""
        characters = sum(len(message.content) for message in request.messages)
        while True:
            permit = await self._limits.admit(characters, request.max_tokens)
            down = self._down if asked < self._down_until else None
            if permit is not None and (down is not None or self._finishing):
                self._limits.leave(permit, unsent=True)
            if down is not None:
                raise ClientDown(down.subject, expected=down.expected, seen=down.seen, fix=down.fix)
            if self._finishing:
                raise Transient("the client is stopping and sends no more requests")
            if permit is not None:
                return permit

    async def _ask(self, server: Server, request: GenerateRequest, permit: Permit) -> Response | None:
        """The reply; None if the server rejected a parameter, left out from now on. Raises Transient, ClientError."""
        form = self.endpoint.form(request, server.dialect)
        try:
            completion, headers = await server.complete(self.endpoint.body(form))
        except self.endpoint.sdk.APIStatusError as error:
            self._hear(error.response.headers)
            failure = judge_failure(error, server.url, form.removable, self.endpoint.redact)
            if isinstance(failure, Refusal):
                self._refuse(server, failure.parameter, failure.reason, form)
                return None
            if not may_be_a_parameter(error):
                raise failure from None  # the SDK's error quotes the server, perhaps with the key
            async with server.eliminating:
                if self.endpoint.form(request, server.dialect) != form:
                    return None  # another request has found the parameter meanwhile
                found = await self._eliminate(server, request, form, error)
            if found is None:
                raise failure from None
            form, completion, headers = found
        self._hear(headers)
        response = self._read(server, request, form, completion)
        self._limits.correct(permit, response.prompt_tokens, response.completion_tokens)
        return response

    def _refuse(self, server: Server, parameter: str, reason: str, form: Form) -> None:
        if server.dialect.refuse(parameter, form.body.get("top_logprobs")) and parameter not in self._told:
            self._told.add(parameter)
            _LOG.warning("%s rejects %s (%s); retrying without it", server.url, parameter, reason)

    async def _eliminate(
        self, server: Server, request: GenerateRequest, form: Form, error: Any
    ) -> tuple[Form, Any, Mapping[str, str]] | None:
        """Find out which parameter a server rejects that does not name it: send the request without each in turn.

        Returns the first form that is answered, with the answer; None if no parameter is at fault. Once per kind of error.
        Raises Transient if the search was interrupted.
        """
        found = signature(error)
        if found in server.dialect.unexplained:
            return None
        for parameter in (name for name in REMOVABLE if name in form.removable):
            shorter = self.endpoint.form(request, server.dialect.without(parameter))
            try:
                completion, headers = await server.complete(self.endpoint.body(shorter))
            except self.endpoint.sdk.APIStatusError as other:
                failure = judge_failure(other, server.url, shorter.removable, self.endpoint.redact)
                if isinstance(failure, Transient):  # it says nothing about the parameter; the request is retried
                    raise failure from None
                continue
            reason = f"status {error.status_code} with it, an answer without it"
            self._refuse(server, parameter, reason, form)
            return shorter, completion, headers
        server.dialect.unexplained.add(found)
        return None

    def _hear(self, headers: Mapping[str, str]) -> None:
        """Use the rate limits that a server reports. Ignored with several servers, as each has its own limits."""
        if len(self._servers) == 1:
            self._limits.told(headers)

    def _choose(self) -> Server:
        """The least busy healthy server, or the least busy of all if none is healthy."""
        well = [server for server in self._servers if server.breaker.admits()]
        return min(well or self._servers, key=lambda server: (server.in_flight, server.breaker.trips))

    def _read(self, server: Server, request: GenerateRequest, form: Form, completion: Any) -> Response:
        try:
            return self.endpoint.read(request, form, completion)
        except MalformedReply as error:
            reason = self.endpoint.redact(str(error))[:200]
            server.breaker.failed(time.monotonic(), reason)
            raise Transient(reason) from None
