"""One server of chat completions: its connections, what kind it is, and how well it is.

Turns silence and nonsense into ``Transient``; leaves errors that a server words itself to the caller. Sends only what it
is given.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from evalkit.clients.dialects import Dialect
from evalkit.clients.failures import Transient, retry_after
from evalkit.clients.keys import Redactor

__all__ = ["Health", "Server"]

_LOG = logging.getLogger(__name__)
_CONNECT_S, _LOOK_S = 10.0, 20.0  # time for a connection, and for the list of models
_LOOKS = 3  # at the list of models, before it is done without
_REST_S, _LONGEST_REST_S = 5.0, 60.0
_TELL_EVERY_S = 60.0


@dataclass(slots=True)
class Health:
    """How well a server is. One that was silent is left alone for a while, twice as long every time, until it answers."""

    silences: int = 0
    silent_at: float = 0.0
    resting_until: float = 0.0
    reason: str = ""
    told_at: float = -math.inf
    telling: bool = False  # the user was told of this silence

    def answered(self, url: str) -> None:
        if self.telling:
            _LOG.warning("%s answers again", url)
        self.silences, self.telling = 0, False

    def was_silent(self, url: str, reason: str) -> None:
        now = time.monotonic()
        self.silent_at, self.reason = now, reason
        if self.silences and now < self.resting_until:  # one of several requests that met the same silence
            return
        if not self.telling and now - self.told_at > _TELL_EVERY_S:
            _LOG.warning("%s: %s; trying again", url, reason)
            self.told_at, self.telling = now, True
        self.resting_until = now + min(_REST_S * 2**self.silences, _LONGEST_REST_S)
        self.silences += 1


class Server:
    """The server at ``url``, through the ``openai`` SDK. ``in_flight``: requests, which the caller counts.

    To be made and used in one event loop.
    """

    def __init__(
        self, sdk: ModuleType, url: str, key: str | None, dialect: Dialect, timeout_s: float, redact: Redactor
    ) -> None:
        self.url, self.dialect, self.health, self.in_flight = url, dialect, Health(), 0
        self._sdk, self._timeout_s, self._redact = sdk, timeout_s, redact
        self._connections = sdk.AsyncOpenAI(
            base_url=url,
            api_key=key or "none",
            timeout=sdk.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s)),
            max_retries=0,
        )
        self._looks = 0
        self._looking = asyncio.Lock()

    async def close(self) -> None:
        await self._connections.close()

    async def complete(self, body: dict[str, Any]) -> Any:
        """The completion that a server answers with. Raises Transient, the SDK's APIStatusError."""
        return await self._call(self._connections.chat.completions.create(**body), self._timeout_s)

    async def look(self) -> None:
        """Find out what kind of server it is, once. Raises Transient where it cannot be reached."""
        began = time.monotonic()
        async with self._looking:
            if self.dialect.kind is not None:
                return
            if self.health.silences and self.health.silent_at >= began:  # as whoever looked before us found
                raise Transient(self.health.reason, silent=True)
            self._looks += 1
            listed: Any = None
            try:
                listed = await self._call(self._connections.models.list(), min(self._timeout_s, _LOOK_S))
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

    async def _call(self, answer: Awaitable[Any], timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                answered = await answer
        except self._sdk.APIStatusError:
            self.health.answered(self.url)
            raise
        except (TimeoutError, self._sdk.APIConnectionError) as error:
            raise self._silence(error, timeout_s) from None
        except (self._sdk.OpenAIError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            self.health.answered(self.url)
            raise Transient(f"a reply that cannot be read: {self._redact(str(error))[:100]}") from None
        self.health.answered(self.url)
        return answered

    def _silence(self, error: Exception, timeout_s: float) -> Transient:
        """What there is to say of no answer."""
        cause = error.__cause__ or error
        never_met = type(cause).__name__ in ("ConnectError", "ConnectTimeout")
        why = self._redact(" ".join(f"{type(cause).__name__} {cause}".split()))[:200]
        reason = f"{'no' if never_met else 'broken'} connection: {why}"
        if not never_met and isinstance(error, TimeoutError | self._sdk.APITimeoutError):
            reason = f"no reply within {timeout_s:g} s"
        self.health.was_silent(self.url, reason)
        return Transient(reason, silent=True)
