"""The client for any server that speaks the chat-completions protocol: a hosted API, vLLM's server, several of them.

Keeps many requests in flight, over all its base URLs together; a request goes to the least busy server that is well.
What can heal is tried again with growing, jittered pauses, or as long as the server asks for; what cannot is not. The key
comes from the environment and goes nowhere but to the servers. Writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from evalkit.clients.dialects import CONSTRAINTS, Ask, Constraints, Dialect, Form, MalformedReply, read_reply
from evalkit.clients.failures import Refusal, Transient, judge_failure
from evalkit.clients.keys import Redactor, checked_fields, checked_url, guard_logs, read_key
from evalkit.clients.names import name_with_options
from evalkit.clients.servers import Server
from evalkit.errors import BadConfig, ClientDown, ClientError, NoAnswer, require
from evalkit.records import Message, Response

__all__ = ["OpenAIClient"]

_LOG = logging.getLogger(__name__)
_HOSTED = "https://api.openai.com/v1"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_TOLD_PAUSE_S = 20.0  # the user hears of a pause that a server asks for if it is longer
_PATIENCE_S = 180.0  # after so long without an answer to anybody, one more silence is the last
_BAD_NEWS_S = 1.0  # whoever asks so soon after all were given up is told the same


class OpenAIClient:
    """Asks ``model`` at ``base_url``: one, or a list that serve the same model; default the hosted API of OpenAI.

    ``temperature``: None leaves it to the server. ``concurrency``: requests in flight, over all servers.
    ``requests_per_minute``: a limit of the account. ``timeout_s``: of one attempt, from sending to the last byte.
    ``max_attempts``: per request. ``api_key_env``: the environment variable that holds the key. ``constraints``: how
    output is constrained, "auto" asks the server what it is. ``extra_body``: further fields of every request.
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
        timeout_s: float = 300.0,
        max_attempts: int = 10,
        api_key_env: str = "OPENAI_API_KEY",
        constraints: Constraints = "auto",
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        self._openai, self._tenacity = require("openai", "api"), require("tenacity", "api")
        _expect("temperature", temperature, temperature is None or _number(temperature, 0), "a number from 0, or null")
        _expect("concurrency", concurrency, _number(concurrency, 1, int), "a whole number from 1")
        _expect("max_attempts", max_attempts, _number(max_attempts, 1, int), "a whole number from 1")
        _expect("timeout_s", timeout_s, _number(timeout_s, 0.01), "seconds, a number above 0")
        rate = requests_per_minute
        _expect("requests_per_minute", rate, rate is None or _number(rate, 0.01), "a number above 0")
        if rate is not None:
            require("aiolimiter", "api")
        _expect("constraints", constraints, constraints in CONSTRAINTS, f"one of {', '.join(CONSTRAINTS)}")
        self._key = read_key(api_key_env)
        self._redact = Redactor(self._key, piece=8)
        named = isinstance(model, str) and model != "" and self._redact(model) == model
        _expect("model", self._redact(str(model)), named, "the name of a model")
        self._clean = Redactor(self._key, least=8, piece=12 if len(self._key or "") >= 16 else None)  # for replies
        urls = base_url or os.environ.get("OPENAI_BASE_URL") or _HOSTED
        urls = [urls] if isinstance(urls, str) else urls
        self._dialects = {checked_url(url, self._redact): _dialect(constraints) for url in urls}
        if self._key is None and _HOSTED in self._dialects:
            raise _no_key(api_key_env)
        self._model, self._temperature, self._extra = model, temperature, checked_fields(extra_body, self._redact)
        self.name = name_with_options(model, temperature, self._extra)
        self.concurrency, self._rate = concurrency, rate
        self._timeout_s, self._max_attempts = timeout_s, max_attempts
        self._servers: list[Server] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last_success = self._told_until = 0.0
        self._down: ClientDown | None = None  # as all hear who asked before ``_down_until``
        self._down_until = 0.0
        self._finishing = False
        if self._key is not None:
            guard_logs(self._key)

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
        self._connect()
        ask = Ask(messages, schema, choices, regex, logprobs, seed, max_tokens, self._temperature)
        asked = time.monotonic()
        async with self._gate:
            try:
                return await self._until_answered(ask, asked)
            except ClientDown as error:
                if asked >= self._down_until:
                    self._down, self._down_until = error, time.monotonic() + _BAD_NEWS_S
                    self._bad_news.set()  # wakes who pauses …
                    self._bad_news.clear()  # … now, and nobody later
                raise

    def finish(self) -> None:
        """Wait for what is sent and send nothing more, nor anything again. Raises NoAnswer for the rest, where it waits."""
        self._finishing = True
        if self._servers:
            self._bad_news.set()

    async def close(self) -> None:
        """Close the connections."""
        servers, self._servers = self._servers, []
        if self._loop is asyncio.get_running_loop():  # those of a loop that is gone went with it
            await asyncio.gather(*(server.close() for server in servers))

    def _connect(self) -> None:
        """Connections of the running event loop, unless there are some."""
        loop = asyncio.get_running_loop()
        if self._servers and self._loop is loop:
            return
        self._loop, self._down_until, self._bad_news = loop, 0.0, asyncio.Event()
        self._gate = asyncio.Semaphore(self.concurrency)
        self._limiter: Any = contextlib.nullcontext()
        if self._rate is not None:
            self._limiter = require("aiolimiter", "api").AsyncLimiter(max(self._rate / 60, 1), max(60 / self._rate, 1))
        self._servers = [
            Server(self._openai, url, self._key, dialect, self._timeout_s, self._redact)
            for url, dialect in self._dialects.items()
        ]

    async def _until_answered(self, ask: Ask, asked: float) -> Response:
        tenacity, started = self._tenacity, time.monotonic()
        jittered = tenacity.wait_random_exponential(multiplier=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S)

        def pause(state: Any) -> float:
            """At least what the server asks for, and a little apart from all others that it asked the same."""
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
            response: Response = await retrying(self._attempt, ask, asked)
        except Transient as error:
            raise self._gave_up(error, started) from None
        self._last_success = time.monotonic()
        return response

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._bad_news.wait(), seconds)

    def _tell(self, state: Any) -> None:
        """Of a long pause that a server asked for, once while it lasts; of others in the debugging log only."""
        error, pause_s, now = state.outcome.exception(), state.next_action.sleep, time.monotonic()
        level = logging.DEBUG
        if error.wait_s is not None and pause_s > _TOLD_PAUSE_S and now >= self._told_until:
            level, self._told_until = logging.WARNING, now + pause_s
        _LOG.log(level, "attempt %d: %s; again in %.1f s", state.attempt_number, error.reason, pause_s)

    def _is_silent(self, error: Transient, started: float) -> bool:
        """Whether nobody has been answered for so long that waiting on would be in vain."""
        return error.silent and time.monotonic() - max(started, self._last_success) > _PATIENCE_S

    def _gave_up(self, error: Transient, started: float) -> ClientError:
        where = ", ".join(server.url for server in self._servers)
        again = "the same command goes on"
        fix = f"see that the server is up, lower concurrency or raise timeout_s; {again}"
        if self._last_success < started or self._is_silent(error, started):
            mend = fix if error.silent else f"see the reason, and check the base URL; {again}"
            return ClientDown(where, expected="an answer to any request", seen=error.reason, fix=mend)
        return NoAnswer(where, expected=f"an answer in {self._max_attempts} attempts", seen=error.reason, fix=fix)

    async def _attempt(self, ask: Ask, asked: float) -> Response:
        """Ask one server; again at once where it only refuses a parameter. Raises Transient, ClientError."""
        if asked < self._down_until and (down := self._down) is not None:
            raise ClientDown(down.subject, expected=down.expected, seen=down.seen, fix=down.fix)
        server = self._choose()
        server.in_flight += 1
        try:
            await server.look()
            while True:
                form = server.dialect.put(ask)
                try:
                    async with self._limiter:
                        if self._finishing:
                            raise Transient("nothing more is sent")
                        completion = await server.complete(self._body(form))
                except self._openai.APIStatusError as error:
                    failure = judge_failure(error, server.url, form.removable, self._redact)
                    if not isinstance(failure, Refusal):
                        raise failure from None  # the SDK's error holds the server's own words
                    if server.dialect.refuse(failure.parameter):
                        told = (server.url, failure.parameter, failure.reason)
                        _LOG.warning("%s does not take %s (%s): asking without", *told)
                else:
                    return self._read(ask, form, completion)
        finally:
            server.in_flight -= 1

    def _choose(self) -> Server:
        """The least busy of those that are well. One that was silent gets a single request after its rest, to see."""
        now = time.monotonic()
        well = [
            server
            for server in self._servers
            if not server.health.silences or (server.health.resting_until <= now and not server.in_flight)
        ]
        return min(well or self._servers, key=lambda server: (server.in_flight, server.health.silences))

    def _read(self, ask: Ask, form: Form, completion: Any) -> Response:
        """The reply, without the key if a server should tell it. Raises Transient."""
        try:
            response = read_reply(ask, form, completion)
        except MalformedReply as error:
            raise Transient(self._redact(str(error))[:200]) from None
        clean, text = self._clean, self._clean(response.text)
        spelled = "".join(next(iter(candidates), "") for candidates in response.logprobs)
        tokens = [spelled, *(token for candidates in response.logprobs for token in candidates)]
        told = text != response.text or any(clean(token) != token for token in tokens)
        return replace(
            response,
            text=text,
            logprobs=() if told else response.logprobs,
            finish_reason=clean(response.finish_reason),
            model=clean(response.model),
        )

    def _body(self, form: Form) -> dict[str, Any]:
        return {"model": self._model, **form.body, "extra_body": {**self._extra, **form.extra}}


# options


def _expect(option: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise BadConfig(f"{option} of client 'openai'", expected=expected, seen=repr(value)[:80], fix="correct it")


def _number(value: Any, least: float, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value < float("inf")


def _dialect(constraints: Constraints) -> Dialect:
    return Dialect(None if constraints == "auto" else constraints)


def _no_key(variable: str) -> BadConfig:
    return BadConfig(
        "client 'openai'",
        expected=f"the API key in the environment variable {variable}",
        seen="no such variable",
        fix=f"export {variable}=…, or give the URL of a server of your own with --base-url",
    )
