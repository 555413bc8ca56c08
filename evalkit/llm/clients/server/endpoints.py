"""A model behind OpenAI's protocol, as a client's options describe it: URLs, API key, name, further fields.

Checks these options, builds the bodies of requests and reads replies; if a server repeats the API key in a reply, it is cut
out. Reads the environment; makes no API calls.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from evalkit.errors import BadConfig, require
from evalkit.llm.clients.server.connection import Server
from evalkit.llm.clients.server.dialects import Dialect, Form, read_reply
from evalkit.llm.clients.server.keys import Redactor, checked_fields, checked_url, guard_logs, read_key
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.llm.requests.names import name_with_options
from evalkit.records import Response

__all__ = ["Endpoint", "expect", "is_number"]

_HOSTED = "https://api.openai.com/v1"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The servers of one model.

    ``sdk``: the ``openai`` package.
    ``extra``: further fields of every request.
    ``name``: the model's name and every option that changes answers.
    ``redact``: cuts the API key out of error messages.
    """

    sdk: ModuleType
    model: str
    temperature: float | None
    extra: Mapping[str, Any]
    urls: tuple[str, ...]
    name: str
    redact: Redactor
    _key: str | None
    _clean: Redactor  # for replies: less strict, as text may contain a short key by chance

    @classmethod
    def of(
        cls,
        model: str,
        *,
        base_url: str | Sequence[str] | None,
        temperature: float | None,
        api_key_env: str,
        extra_body: Mapping[str, Any] | None,
    ) -> Endpoint:
        """Check the options of a client. Raises BadConfig, MissingExtra.

        ``base_url``: default: the environment variable OPENAI_BASE_URL, else the hosted API.
        """
        sdk = require("openai", "api")
        expect(
            "temperature",
            temperature,
            temperature is None or is_number(temperature, 0),
            "a number from 0, or null for the server's own",
        )
        key = read_key(api_key_env)
        redact = Redactor(key, piece=8)
        named = isinstance(model, str) and model != "" and redact(model) == model
        expect("model", redact(str(model)), named, "the name of a model")
        urls = base_url or os.environ.get("OPENAI_BASE_URL") or _HOSTED
        urls = [urls] if isinstance(urls, str) else urls
        checked = tuple(dict.fromkeys(checked_url(url, redact) for url in urls))
        if key is None and _HOSTED in checked:
            raise _no_key(api_key_env)
        extra = checked_fields(extra_body, redact)
        clean = Redactor(key, least=8, piece=12 if len(key or "") >= 16 else None)
        if key is not None:
            guard_logs(key)
        name = name_with_options(model, temperature, extra)
        return cls(sdk, model, temperature, extra, checked, name, redact, key, clean)

    def server(self, url: str, dialect: Dialect, timeout_s: float) -> Server:
        """Connections to the server at ``url``, one of ``urls``, for the running event loop."""
        return Server(self.sdk, url, self._key, dialect, timeout_s, self.redact)

    def form(self, request: GenerateRequest, dialect: Dialect) -> Form:
        """The request in this dialect, at the client's temperature."""
        return dialect.put(request, self.temperature)

    def body(self, form: Form) -> dict[str, Any]:
        """The JSON object that is sent."""
        return {"model": self.model, **form.body, **self.extra, **form.extra}

    def read(self, request: GenerateRequest, form: Form, completion: Any) -> Response:
        """The reply without the API key; without log-probabilities if the key was in it. Raises MalformedReply."""
        response = read_reply(request, form, completion)
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


def expect(option: str, value: Any, holds: bool, expected: str, client: str = "openai") -> None:
    """Raise BadConfig, which names the option, unless ``holds``."""
    if not holds:
        raise BadConfig(
            f"{option} of client {client!r}", expected=expected, seen=repr(value)[:80], fix="correct the option"
        )


def is_number(value: Any, least: float, kind: Any = int | float) -> bool:
    """Whether it is a finite number, at least ``least`` and not a bool."""
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value < float("inf")


def _no_key(variable: str) -> BadConfig:
    return BadConfig(
        "client 'openai'",
        expected=f"the API key in the environment variable {variable}",
        seen="no such variable",
        fix=f"export {variable}=…, or give the URL of your own server with --base-url",
    )
