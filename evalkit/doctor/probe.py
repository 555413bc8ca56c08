"""Sends one short request through a client, to check whether its model answers.

Creates the client as a run does, but with few retries, and closes it afterwards. Records nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass

from evalkit import registry
from evalkit.abilities import close_client
from evalkit.protocols import Client
from evalkit.records import Message, Response
from evalkit.util.run_async import wait_for

__all__ = ["Reply", "probe"]

_QUESTION = "Reply with the word yes."
_MAX_TOKENS = 8
_ATTEMPTS = 2
_LONGEST_S = 900.0  # seconds; an engine may have to load a large model first


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply.

    ``model``: the name of the client.
    ``seconds``: the time to the reply, including the start of an engine.
    """

    model: str
    seconds: float
    response: Response


def probe(spec: str, base_url: str | None = None, options: Sequence[str] = ()) -> Reply:
    """The reply of the client ``NAME:VALUE``, created with ``key=value`` options.

    Raises PluginError, BadConfig, MissingExtra, TimeoutError, and the errors of the client.
    """
    client = _make(spec, base_url, options)
    started = time.monotonic()
    response = wait_for(_ask(client))
    return Reply(client.name, time.monotonic() - started, response)


def _make(spec: str, base_url: str | None, options: Sequence[str]) -> Client:
    from evalkit.config.run_config import RunConfig
    from evalkit.pipeline.resolved import ResolvedRun

    given = dict(registry.parse_option(option) for option in options)
    if base_url is not None:
        given["base_url"] = base_url
    part = registry.parse_part("clients", spec)
    with contextlib.suppress(TypeError, ValueError):  # a factory without a signature
        if "max_attempts" in inspect.signature(registry.load_class("clients", part.name)).parameters:
            given = {"max_attempts": _ATTEMPTS, **part.options, **given}
    client = ResolvedRun(RunConfig(model="-", dictionaries=("-",), client=spec, client_options=given)).client
    assert client is not None  # a client was given
    return client


async def _ask(client: Client) -> Response:
    try:
        async with asyncio.timeout(_LONGEST_S):
            return await client.generate([Message("user", _QUESTION)], max_tokens=_MAX_TOKENS)
    finally:
        await close_client(client)
