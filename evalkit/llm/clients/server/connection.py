"""One server of OpenAI's protocol: its connections, which kind of server it is, and whether it is healthy.

Raises ``Transient`` if a server does not reply or its reply is unreadable; an error status is left to the caller. Sends
only what it is given, except for one look at the list of models.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from evalkit.llm.clients.server.breaker import Breaker
from evalkit.llm.clients.server.dialects import Dialect
from evalkit.llm.clients.server.failures import Transient, retry_after
from evalkit.llm.clients.server.keys import Redactor

__all__ = ["REPLY_BYTES", "Oversize", "Server"]

_CONNECT_S, _LOOK_S = 10.0, 20.0  # timeouts of connecting, and of reading the list of models
REPLY_BYTES = 64_000_000  # size limit of a reply, decompressed
_most_bytes: ContextVar[int] = ContextVar("_most_bytes", default=REPLY_BYTES)  # size limit of the current call's reply
_LOOKS = 3  # attempts to read the list of models before assuming a server that is not vLLM's


class Oversize(Transient):
    """A reply that exceeds the size limit."""


async def _limit(response: Any) -> None:
    """Make an HTTP response stop reading at the size limit; decompressed bytes count, so a small reply cannot expand."""
    read, most = response.aiter_bytes, _most_bytes.get()

    async def some(*options: Any, **named: Any) -> AsyncIterator[bytes]:
        left = most
        async for part in read(*options, **named):
            left -= len(part)
            if left < 0:
                raise Oversize(f"a reply of more than {most / 1e6:,.0f} MB")
            yield part

    response.aiter_bytes = some


class Server:
    """The server at ``url``, used through the ``openai`` SDK. Create and use it in one event loop.

    ``in_flight``: number of requests in flight; the caller counts them.
    """

    def __init__(
        self, sdk: ModuleType, url: str, key: str | None, dialect: Dialect, timeout_s: float, redact: Redactor
    ) -> None:
        self.url, self.dialect, self.breaker, self.in_flight = url, dialect, Breaker(url), 0
        self._sdk, self._timeout_s, self._redact = sdk, timeout_s, redact
        self.connections: Any = sdk.AsyncOpenAI(
            base_url=url,
            api_key=key or "none",
            timeout=sdk.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s)),
            max_retries=0,
            http_client=sdk.DefaultAsyncHttpxClient(event_hooks={"response": [_limit]}),
        )
        self._looks = 0
        self._looking = asyncio.Lock()
        self.eliminating = asyncio.Lock()  # held while it is found out which parameter the server rejects

    async def close(self) -> None:
        await self.connections.close()

    async def complete(self, body: dict[str, Any]) -> tuple[Any, Mapping[str, str]]:
        """The server's completion and the reply's headers. Raises Transient, the SDK's APIStatusError.

        ``body``: all fields of the request; fields that the SDK does not know are sent unchanged.
        """
        fields = {"model": body["model"], "messages": body["messages"]}
        more = {name: value for name, value in body.items() if name not in fields}
        create = self.connections.chat.completions.with_raw_response.create
        return await self.call(self._parsed(create(**fields, extra_body=more)), self._timeout_s)  # type: ignore[no-any-return]

    @staticmethod
    async def _parsed(answer: Awaitable[Any]) -> tuple[Any, Mapping[str, str]]:
        raw = await answer
        return raw.parse(), raw.headers

    async def look(self) -> None:
        """Find out which kind of server it is from its list of models, once. Raises Transient if it does not reply."""
        began = time.monotonic()
        async with self._looking:
            if self.dialect.kind is not None:
                return
            if self.breaker.is_open and self.breaker.failed_at >= began:  # the attempt before ours failed
                raise Transient(self.breaker.reason, silent=True)
            self._looks += 1
            listed: Any = None
            try:
                listed = await self.call(self.connections.models.list(), min(self._timeout_s, _LOOK_S))
            except Transient as error:
                if error.silent or self._looks < _LOOKS:
                    raise
            except self._sdk.APIStatusError as error:
                if (error.status_code == 429 or error.status_code >= 500) and self._looks < _LOOKS:
                    wait_s = retry_after(error.response.headers)
                    raise Transient(f"status {error.status_code} to the list of models", wait_s) from None
            models = getattr(listed, "data", None)
            owners = [getattr(model, "owned_by", "") for model in (models if isinstance(models, list) else ())]
            self.dialect.kind = "vllm" if "vllm" in owners else "json_schema"

    async def call(self, answer: Awaitable[Any], timeout_s: float, most_bytes: int = REPLY_BYTES) -> Any:
        """Await ``answer``, within limits of time and size. Raises Transient, Oversize, the SDK's APIStatusError."""
        began = time.monotonic()
        before = _most_bytes.set(most_bytes)
        try:
            async with asyncio.timeout(timeout_s):
                answered = await answer
        except self._sdk.APIStatusError as error:
            if error.status_code >= 500:
                self.breaker.failed(began, f"status {error.status_code}", wait_s=retry_after(error.response.headers))
            else:
                self.breaker.answered(began)
            raise
        except (TimeoutError, self._sdk.APIConnectionError) as error:
            if isinstance(error.__cause__, Oversize):
                self.breaker.failed(began, error.__cause__.reason)
                raise error.__cause__ from None
            raise self._silence(error, timeout_s, began) from None
        except (self._sdk.OpenAIError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            reason = f"an unreadable reply: {self._redact(str(error))[:100]}"
            self.breaker.failed(began, reason)
            raise Transient(reason) from None
        finally:
            _most_bytes.reset(before)
        self.breaker.answered(began)
        return answered

    def _silence(self, error: Exception, timeout_s: float, began: float) -> Transient:
        """The error for a request that got no reply."""
        cause = error.__cause__ or error
        never_met = type(cause).__name__ in ("ConnectError", "ConnectTimeout")
        why = self._redact(" ".join(f"{type(cause).__name__} {cause}".split()))[:200]
        reason = f"{'no' if never_met else 'broken'} connection: {why}"
        late = not never_met and isinstance(error, TimeoutError | self._sdk.APITimeoutError)
        if late:
            reason = f"no reply within {timeout_s:g} s"
        self.breaker.failed(began, reason, silent=never_met or late)
        return Transient(reason, silent=True)
