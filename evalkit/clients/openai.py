"""The client for any server that speaks the chat-completions protocol: a hosted API, vLLM's server, several of them.

Keeps many requests in flight, over all its base URLs together; a request goes to the least busy server that is well.
What can heal is tried again with growing, jittered pauses, or as long as the server asks for; what cannot is not. The key
comes from the environment and goes nowhere but to the server. Writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from evalkit.clients.dialects import CONSTRAINTS, Ask, Constraints, Dialect, MalformedReply
from evalkit.clients.failures import Redactor, Refusal, Transient, judge_failure
from evalkit.errors import BadConfig, ClientDown, ClientError, NoAnswer, require
from evalkit.records import Message, Response

__all__ = ["OpenAIClient"]

_LOG = logging.getLogger(__name__)
_HOSTED = "https://api.openai.com/v1"
_REST_S = 5.0  # a server that could not be reached is left alone for so long, while there are others
_CONNECT_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(slots=True)
class _Server:
    """One base URL: its connections, what it understands, how busy and how well it is."""

    url: str
    sdk: Any
    dialect: Dialect
    in_flight: int = 0
    resting_until: float = 0.0
    asked_what_it_is: asyncio.Lock = field(default_factory=asyncio.Lock)


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
        self._openai = require("openai", "api")
        require("tenacity", "api")
        if constraints not in CONSTRAINTS:
            raise BadConfig(
                "constraints of client 'openai'",
                expected=f"one of {', '.join(CONSTRAINTS)}",
                seen=repr(constraints),
                fix="use auto",
            )
        urls = (
            [base_url] if isinstance(base_url, str) else list(base_url or [os.environ.get("OPENAI_BASE_URL", _HOSTED)])
        )
        self._urls = [_checked(url) for url in urls]
        self._key = _key(api_key_env, needed=_HOSTED in self._urls)
        self._redact = Redactor(self._key)
        self._model, self._temperature, self._extra = model, temperature, dict(extra_body or {})
        self.name = ";".join([model, *_differences(temperature, self._extra)])
        self.concurrency, self._rate = concurrency, requests_per_minute
        self._timeout_s, self._max_attempts, self._constraints = timeout_s, max_attempts, constraints
        self._servers: list[_Server] = []
        self._gate = asyncio.Semaphore(concurrency)
        self._limiter: Any = contextlib.nullcontext()
        self._last_success = 0.0

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
        if not self._servers:
            self._connect()
        ask = Ask(messages, schema, choices, regex, logprobs, seed, max_tokens)
        async with self._gate:
            return await self._until_answered(ask)

    async def close(self) -> None:
        """Close the connections."""
        servers, self._servers = self._servers, []
        for server in servers:
            await server.sdk.close()

    def _connect(self) -> None:
        """Connections of the running event loop."""
        self._gate = asyncio.Semaphore(self.concurrency)
        if self._rate is not None:
            self._limiter = require("aiolimiter", "api").AsyncLimiter(max(self._rate / 60, 1), max(60 / self._rate, 1))
        for url in self._urls:
            sdk = self._openai.AsyncOpenAI(
                base_url=url,
                api_key=self._key or "none",
                timeout=self._openai.Timeout(self._timeout_s, connect=_CONNECT_S),
                max_retries=0,
            )
            kind = None if self._constraints == "auto" else self._constraints
            self._servers.append(_Server(url, sdk, Dialect(kind)))

    async def _until_answered(self, ask: Ask) -> Response:
        import tenacity

        started = time.monotonic()
        jittered = tenacity.wait_random_exponential(multiplier=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.wait_s if isinstance(error, Transient) else None
            return float(jittered(state)) if asked is None else asked + 0.1 * float(jittered(state))

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._max_attempts),
            wait=pause,
            retry=tenacity.retry_if_exception_type(Transient),
            reraise=True,
        )
        try:
            response: Response = await retrying(self._attempt, ask)
        except Transient as error:
            raise self._gave_up(error, started) from error
        self._last_success = time.monotonic()
        return response

    def _gave_up(self, error: Transient, started: float) -> ClientError:
        where = ", ".join(server.url for server in self._servers)
        fix = "the same command goes on; see that the server is up, or lower concurrency"
        if self._last_success < started:
            return ClientDown(where, expected="an answer to any request", seen=error.reason, fix=fix)
        return NoAnswer(where, expected=f"an answer in {self._max_attempts} attempts", seen=error.reason, fix=fix)

    async def _attempt(self, ask: Ask) -> Response:
        """Ask one server; again at once where it only refuses a parameter. Raises Transient, ClientError."""
        server = self._least_busy()
        server.in_flight += 1
        try:
            await self._find_out(server)
            while True:
                body = self._body(server, ask)
                try:
                    async with self._limiter, asyncio.timeout(self._timeout_s):
                        completion = await server.sdk.chat.completions.create(**body)
                except self._openai.APIStatusError as error:
                    failure = judge_failure(error, server.url, set(body) | set(body["extra_body"]), self._redact)
                    if isinstance(failure, Refusal) and self._leave_out(server, failure):
                        continue
                    raise self._as_error(failure, server) from None  # the SDK's error holds the server's own words
                except (TimeoutError, self._openai.APITimeoutError):
                    raise Transient(f"no reply within {self._timeout_s:g} s") from None
                except self._openai.APIConnectionError as error:
                    server.resting_until = time.monotonic() + _REST_S
                    raise Transient(f"no connection: {self._redact(str(error.__cause__ or error))[:200]}") from None
                except (self._openai.APIError, ValueError) as error:
                    raise Transient(f"a reply that is no JSON: {self._redact(str(error))[:100]}") from None
                return self._read(server, ask, completion)
        finally:
            server.in_flight -= 1

    def _read(self, server: _Server, ask: Ask, completion: Any) -> Response:
        try:
            response = server.dialect.read(ask, completion)
        except MalformedReply as error:
            raise Transient(self._redact(str(error))) from None
        text = self._redact(response.text)
        return (
            response
            if text == response.text
            else Response(text, (), response.prompt_tokens, response.completion_tokens)
        )

    def _least_busy(self) -> _Server:
        now = time.monotonic()
        well = [server for server in self._servers if server.resting_until <= now]
        return min(well or self._servers, key=lambda server: server.in_flight)

    async def _find_out(self, server: _Server) -> None:
        """What kind of server it is, once. Raises Transient where it cannot be reached."""
        async with server.asked_what_it_is:
            if server.dialect.kind is not None:
                return
            if server.resting_until > time.monotonic():
                raise Transient("no connection")
            kind: Constraints = "json_schema"
            try:
                async with asyncio.timeout(self._timeout_s):
                    listed = await server.sdk.models.list()
                if any(getattr(model, "owned_by", "") == "vllm" for model in listed.data or ()):
                    kind = "vllm"
            except (TimeoutError, self._openai.APIConnectionError) as error:
                server.resting_until = time.monotonic() + _REST_S
                raise Transient(f"no connection: {type(error).__name__}") from None
            except self._openai.APIStatusError as error:
                if error.status_code >= 500 or error.status_code == 429:
                    raise Transient(f"status {error.status_code} to the list of models") from None
            except (self._openai.APIError, ValueError, AttributeError, TypeError):
                pass  # a server without a list of models
            server.dialect.kind = kind

    def _body(self, server: _Server, ask: Ask) -> dict[str, Any]:
        body = {"model": self._model, **server.dialect.body(ask)}
        if self._temperature is not None and "temperature" not in server.dialect.refused:
            body["temperature"] = self._temperature
        return body | {"extra_body": {**self._extra, **body.get("extra_body", {})}}

    def _leave_out(self, server: _Server, refusal: Refusal) -> bool:
        left_out = server.dialect.refuse(refusal.parameter)
        if left_out:
            _LOG.warning("%s does not take %s (%s): asking without", server.url, refusal.parameter, refusal.reason)
        return left_out

    def _as_error(self, failure: Transient | Refusal | ClientError, server: _Server) -> Exception:
        if isinstance(failure, Refusal):
            return ClientDown(
                server.url,
                expected=f"a server that takes {failure.parameter}",
                seen=failure.reason,
                fix="use another model or server",
            )
        return failure


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadConfig(
            "base URL", expected="http://… or https://…", seen=repr(parts.scheme + ":…"), fix="write it in full"
        )
    if parts.username or parts.password or parts.query:
        raise BadConfig(
            f"base URL of {parts.hostname}",
            expected="no user name, password or query in it: keys come from the environment",
            seen="one of these",
            fix="take it out, and set OPENAI_API_KEY",
        )
    return url.rstrip("/")


def _key(variable: str, *, needed: bool) -> str | None:
    key = os.environ.get(variable, "").strip() or None
    if key is None and needed:
        raise BadConfig(
            "client 'openai'",
            expected=f"the API key in the environment variable {variable}",
            seen="no such variable",
            fix=f"export {variable}=…, or give the URL of a server of your own with --base-url",
        )
    return key


def _differences(temperature: float | None, extra: Mapping[str, Any]) -> list[str]:
    """What of the options changes answers, for the name that records are keyed by."""
    told = [] if temperature == 0 else [f"temperature={'default' if temperature is None else format(temperature, 'g')}"]
    return told + [f"{key}={extra[key]}" for key in sorted(extra)]
