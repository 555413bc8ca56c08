"""The client for any server that speaks the chat-completions protocol: a hosted API, vLLM's server, several of them.

Keeps many requests in flight, over all its base URLs together; a request goes to the least busy server that is well.
What can heal is tried again with growing, jittered pauses, or as long as the server asks for; what cannot is not. The key
comes from the environment and goes nowhere but to the servers. Writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from evalkit.clients.dialects import CONSTRAINTS, Ask, Constraints, Dialect, Form, MalformedReply, read_reply
from evalkit.clients.failures import Health, Refusal, Transient, judge_failure, retry_after
from evalkit.clients.keys import Redactor, checked_fields, checked_url, guard_logs, read_key
from evalkit.errors import BadConfig, ClientDown, ClientError, NoAnswer, require
from evalkit.records import Message, Response

__all__ = ["OpenAIClient"]

_LOG = logging.getLogger(__name__)
_HOSTED = "https://api.openai.com/v1"
_CONNECT_S, _LOOK_S = 10.0, 20.0  # time for a connection, and for the list of models
_LOOKS = 3  # at the list of models, before it is done without
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_TOLD_PAUSE_S = 20.0  # the user hears of a pause that a server asks for if it is longer
_PATIENCE_S = 180.0  # after so long without an answer to anybody, one more silence is the last


@dataclass(slots=True)
class _Server:
    """One base URL: its connections, what it understands, how busy and how well it is."""

    url: str
    sdk: Any
    dialect: Dialect
    in_flight: int = 0
    looks: int = 0
    health: Health = field(default_factory=Health)
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)


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
        _expect("model", model, isinstance(model, str) and model != "", "the name of a model")
        _expect("temperature", temperature, temperature is None or _number(temperature, 0), "a number from 0, or null")
        _expect("concurrency", concurrency, _number(concurrency, 1, int), "a whole number from 1")
        _expect("max_attempts", max_attempts, _number(max_attempts, 1, int), "a whole number from 1")
        _expect("timeout_s", timeout_s, _number(timeout_s, 0.01), "seconds, a number above 0")
        rate = requests_per_minute
        _expect("requests_per_minute", rate, rate is None or _number(rate, 0.01), "a number above 0")
        _expect("constraints", constraints, constraints in CONSTRAINTS, f"one of {', '.join(CONSTRAINTS)}")
        self._key = read_key(api_key_env)
        self._redact = Redactor(self._key, piece=8)
        self._clean = Redactor(self._key, least=8, piece=12 if len(self._key or "") >= 16 else None)  # for replies
        urls = base_url or os.environ.get("OPENAI_BASE_URL") or _HOSTED
        urls = [urls] if isinstance(urls, str) else urls
        self._dialects = {checked_url(url, self._redact): _dialect(constraints) for url in urls}
        if self._key is None and _HOSTED in self._dialects:
            raise _no_key(api_key_env)
        self._model, self._temperature, self._extra = model, temperature, checked_fields(extra_body, self._redact)
        self.name = ";".join([model, *_differences(temperature, self._extra)])
        self.concurrency, self._rate = concurrency, rate
        self._timeout_s, self._max_attempts = timeout_s, max_attempts
        self._servers: list[_Server] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last_success = 0.0
        self._wave = 0  # of requests that wait at the same time, and hear together that nobody answers
        self._down: ClientDown | None = None
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
        wave = self._wave
        async with self._gate:
            try:
                return await self._until_answered(ask, wave)
            except ClientDown as error:
                if wave == self._wave:
                    self._wave, self._down = wave + 1, error
                raise

    async def close(self) -> None:
        """Close the connections."""
        servers, self._servers = self._servers, []
        if self._loop is asyncio.get_running_loop():  # those of a loop that is gone went with it
            await asyncio.gather(*(server.sdk.close() for server in servers))

    def _connect(self) -> None:
        """Connections of the running event loop, unless there are some."""
        loop = asyncio.get_running_loop()
        if self._servers and self._loop is loop:
            return
        self._loop = loop
        self._gate = asyncio.Semaphore(self.concurrency)
        self._limiter: Any = contextlib.nullcontext()
        if self._rate is not None:
            self._limiter = require("aiolimiter", "api").AsyncLimiter(max(self._rate / 60, 1), max(60 / self._rate, 1))
        self._servers = [
            _Server(
                url,
                self._openai.AsyncOpenAI(
                    base_url=url,
                    api_key=self._key or "none",
                    timeout=self._openai.Timeout(self._timeout_s, connect=min(_CONNECT_S, self._timeout_s)),
                    max_retries=0,
                ),
                dialect,
            )
            for url, dialect in self._dialects.items()
        ]

    async def _until_answered(self, ask: Ask, wave: int) -> Response:
        tenacity, started = self._tenacity, time.monotonic()
        jittered = tenacity.wait_random_exponential(multiplier=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S)

        def pause(state: Any) -> float:
            """At least what the server asks for, and a little apart from all others that it asked the same."""
            asked, own = state.outcome.exception().wait_s, float(jittered(state))
            return own if asked is None else max(own, asked + min(own, 0.1 * asked))

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self._max_attempts),
                lambda state: self._is_silent(state.outcome.exception(), started),
            ),
            wait=pause,
            retry=tenacity.retry_if_exception_type(Transient),
            before_sleep=_tell,
            reraise=True,
        )
        try:
            response: Response = await retrying(self._attempt, ask, wave)
        except Transient as error:
            raise self._gave_up(error, started) from None
        self._last_success = time.monotonic()
        return response

    def _is_silent(self, error: Transient, started: float) -> bool:
        """Whether nobody has been answered for so long that waiting on would be in vain."""
        return error.silent and time.monotonic() - max(started, self._last_success) > _PATIENCE_S

    def _gave_up(self, error: Transient, started: float) -> ClientError:
        where = ", ".join(server.url for server in self._servers)
        fix = "see that the server is up, lower concurrency or raise timeout_s; the same command goes on"
        if self._last_success < started or self._is_silent(error, started):
            return ClientDown(where, expected="an answer to any request", seen=error.reason, fix=fix)
        return NoAnswer(where, expected=f"an answer in {self._max_attempts} attempts", seen=error.reason, fix=fix)

    async def _attempt(self, ask: Ask, wave: int) -> Response:
        """Ask one server; again at once where it only refuses a parameter. Raises Transient, ClientError."""
        if wave != self._wave and (down := self._down) is not None:
            raise ClientDown(down.subject, expected=down.expected, seen=down.seen, fix=down.fix)
        server = self._choose()
        server.in_flight += 1
        try:
            await self._look(server)
            while True:
                form = server.dialect.put(ask)
                try:
                    async with self._limiter:
                        completion = await self._call(
                            server, server.sdk.chat.completions.create(**self._body(form)), self._timeout_s
                        )
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

    def _choose(self) -> _Server:
        """The least busy of those that are well. One that was silent gets a single request after its rest, to see."""
        now = time.monotonic()
        well = [
            server
            for server in self._servers
            if not server.health.silences or (server.health.resting_until <= now and not server.in_flight)
        ]
        return min(well or self._servers, key=lambda server: server.in_flight)

    async def _call(self, server: _Server, answer: Awaitable[Any], timeout_s: float) -> Any:
        """What a server answers. Raises Transient where that is nothing or nonsense, the SDK's APIStatusError."""
        sent = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                answered = await answer
        except self._openai.APIStatusError:
            server.health.answered(server.url)
            raise
        except (TimeoutError, self._openai.APIConnectionError) as error:
            cause = error.__cause__ or error
            never_met = type(cause).__name__ in ("ConnectError", "ConnectTimeout")
            late = not never_met and isinstance(error, TimeoutError | self._openai.APITimeoutError)
            why = self._redact(" ".join(f"{type(cause).__name__} {cause}".split()))[:200]
            reason = (
                f"no reply within {timeout_s:g} s" if late else f"{'no' if never_met else 'broken'} connection: {why}"
            )
            if never_met or server.health.answered_at <= sent:
                server.health.was_silent(server.url, reason)
            raise Transient(reason, silent=True) from None
        except (self._openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            server.health.answered(server.url)
            raise Transient(f"a reply that cannot be read: {self._redact(str(error))[:100]}") from None
        server.health.answered(server.url)
        return answered

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

    async def _look(self, server: _Server) -> None:
        """Find out what kind of server it is, once. Raises Transient where it cannot be reached."""
        began = time.monotonic()
        async with server.looking:
            if server.dialect.kind is not None:
                return
            if server.health.silences and server.health.silent_at >= began:  # as whoever looked before us found
                raise Transient(server.health.reason, silent=True)
            server.looks += 1
            listed: Any = None
            try:
                listed = await self._call(server, server.sdk.models.list(), min(self._timeout_s, _LOOK_S))
            except Transient as error:
                if error.silent or server.looks < _LOOKS:
                    raise
            except self._openai.APIStatusError as error:
                if (error.status_code == 429 or error.status_code >= 500) and server.looks < _LOOKS:
                    wait_s = retry_after(error.response.headers)
                    raise Transient(f"status {error.status_code} to the list of models", wait_s) from None
            models = getattr(listed, "data", None)
            owners = [getattr(model, "owned_by", "") for model in (models if isinstance(models, list) else ())]
            server.dialect.kind = "vllm" if "vllm" in owners else "json_schema"

    def _body(self, form: Form) -> dict[str, Any]:
        return {"model": self._model, **form.body, "extra_body": {**self._extra, **form.extra}}


def _tell(state: Any) -> None:
    error, pause_s = state.outcome.exception(), state.next_action.sleep
    level = logging.WARNING if error.wait_s is not None and pause_s > _TOLD_PAUSE_S else logging.DEBUG
    _LOG.log(level, "attempt %d: %s; again in %.1f s", state.attempt_number, error.reason, pause_s)


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


def _differences(temperature: float | None, extra: Mapping[str, Any]) -> list[str]:
    """What of the options changes answers, for the name that records are keyed by."""
    told = [] if temperature == 0 else [f"temperature={'default' if temperature is None else format(temperature, 'g')}"]
    values = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in extra.items()
    }
    return told + [f"{key}={values[key]}" for key in sorted(values)]
