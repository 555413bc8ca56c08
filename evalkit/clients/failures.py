"""What a failed request means: try again, try without a parameter, give this request up, or give the server up.

Reads exceptions of the ``openai`` SDK; sends nothing. No text of a server reaches an error before the key is cut out of it.
"""

from __future__ import annotations

import email.utils
import re
import time
from dataclasses import dataclass
from typing import Any

from evalkit.errors import ClientDown, ClientError, ContextOverflow, RequestRefused

__all__ = ["Redactor", "Refusal", "Transient", "judge_failure"]

_AGAIN = frozenset({408, 409, 425, 429})  # and everything from 500
_NEVER = {
    401: "the key in the environment is missing or wrong",
    402: "the account has no credit",
    403: "the key in the environment may not use this model",
    404: "check model name and base URL (which ends in /v1, most often)",
}
_TOO_LONG = re.compile(
    r"context[ _](?:length|window)|maximum (?:model|context) len|too many tokens|prompt is too long|max_model_len", re.I
)
_LONGEST_WAIT_S = 300.0


class Redactor:
    """Cuts a secret out of texts, so that no server can make us write it down."""

    def __init__(self, secret: str | None) -> None:
        self._secret = secret if secret and len(secret) >= 4 else None

    def __call__(self, text: str) -> str:
        return text.replace(self._secret, "[key]") if self._secret else text


class Transient(Exception):
    """Worth another try, after ``wait_s`` seconds if the server said so."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        self.reason, self.wait_s = reason, wait_s
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The server does not take ``parameter``."""

    parameter: str
    reason: str


def judge_failure(error: Any, server: str, parameters: set[str], redact: Redactor) -> Transient | Refusal | ClientError:
    """What an ``openai.APIStatusError`` from ``server`` means for a request that had these ``parameters``."""
    status, body = int(error.status_code), error.body if isinstance(error.body, dict) else {}
    reason = f"status {status}: {redact(' '.join(str(body.get('message') or error.message).split()))[:200]}"
    if status == 429 and "insufficient_quota" in (body.get("code"), body.get("type")):
        return _down(server, reason, "the account has no credit")
    if status in _AGAIN or status >= 500:
        return Transient(reason, _retry_after(error.response.headers))
    if status in _NEVER:
        return _down(server, reason, _NEVER[status])
    message = str(body.get("message") or error.message)
    if body.get("code") == "context_length_exceeded" or _TOO_LONG.search(message):
        return _overflow(message)
    if parameter := _named(body.get("param"), message, parameters):
        return Refusal(parameter, reason)
    return RequestRefused(
        f"request to {server}", expected="an answer", seen=reason, fix="see the reason; the same request fails again"
    )


def _named(param: Any, message: str, parameters: set[str]) -> str | None:
    """The parameter of the request that an error is about: as the server names it, or else the only one in its words."""
    root = re.split(r"[.\[]", str(param or ""))[0]
    if root in parameters:
        return root
    found = [name for name in parameters if re.search(rf"(?<![a-z_]){name}(?![a-z_])", message)]
    return found[0] if len(found) == 1 else None


def _overflow(message: str) -> ContextOverflow:
    """vLLM and the hosted APIs name the limit first and what was asked for after it."""
    numbers = [int(number) for number in re.findall(r"\d+", message.replace(",", "")) if int(number) >= 16]
    limit = numbers[0] if numbers else None
    needed = max((number for number in numbers if limit is not None and number > limit), default=None)
    return ContextOverflow("prompt", limit=limit, needed=needed, fix="use fewer examples, or a model with more context")


def _retry_after(headers: Any) -> float | None:
    """Seconds from the headers Retry-After-Ms or Retry-After (seconds, or a date)."""
    for header, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(header)
        if value is None:
            continue
        try:
            seconds = float(value) / scale
        except ValueError:
            date = email.utils.parsedate_tz(value)
            if date is None:
                continue
            seconds = email.utils.mktime_tz(date) - time.time()
        return min(max(seconds, 0.0), _LONGEST_WAIT_S)
    return None


def _down(server: str, reason: str, fix: str) -> ClientDown:
    return ClientDown(server, expected="an answer", seen=reason, fix=fix)
