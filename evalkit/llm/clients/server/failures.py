"""What a failed request means: try again, try without a parameter, give this request up, or give the server up.

Reads exceptions of the ``openai`` SDK; sends nothing. No text of a server reaches an error or a log before the key is cut
out of it.
"""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from evalkit.errors import ClientDown, ClientError, ContextOverflow, RequestRefused
from evalkit.llm.clients.server.keys import Redactor

__all__ = ["Refusal", "Transient", "judge_failure", "retry_after"]

_AGAIN = frozenset({408, 409, 425, 429})  # and everything from 500
_NEVER = {
    401: "the key in the environment is missing or wrong",
    402: "the account has no credit",
    403: "the key in the environment may not use this model",
    404: "check model name and base URL (which ends in /v1, most often)",
    405: "check the base URL (which ends in /v1, most often)",
}
_NO_CREDIT = ("insufficient_quota", "billing_not_active", "billing_hard_limit_reached")
_TOO_LONG = re.compile(
    r"context[ _](?:length|window|size)|maximum (?:model|context) len|too many tokens|prompt is too long|max_model_len"
    r"|input token count|max_(?:completion_)?tokens\W{1,3}is too large|max_new_tokens\W+must be <=",
    re.I,
)
_UNSUPPORTED = re.compile(
    r"unsupported|not supported|n't support|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed"
    r"|extra (?:field|input)|invalid|not implemented|not available",
    re.I,
)
_NO_SYSTEM = re.compile(
    r"\b(?:system|developer) (?:role|message|prompt|instruction)s?\b.{0,30}(?:\bnot\b|n't|unsupported)", re.I
)
_LONGEST_WAIT_S = 300.0


class Transient(Exception):
    """Worth another try, after ``wait_s`` seconds if the server said so. ``silent``: there was no answer at all."""

    def __init__(self, reason: str, wait_s: float | None = None, *, silent: bool = False) -> None:
        self.reason, self.wait_s, self.silent = reason, wait_s, silent
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The server does not take ``parameter``."""

    parameter: str
    reason: str


def judge_failure(
    error: Any, server: str, removable: Collection[str], redact: Redactor
) -> Transient | Refusal | ClientError:
    """What an ``openai.APIStatusError`` means for a request of which the ``removable`` parameters can be left out."""
    status, body = int(error.status_code), error.body if isinstance(error.body, dict) else {}
    message = _words(error)
    reason = f"status {status}: {redact(' '.join(message.split()))[:200]}"
    if any(name in (body.get("code"), body.get("type")) for name in _NO_CREDIT):
        return _down(server, reason, _NEVER[402])
    if status in _AGAIN:
        return Transient(reason, retry_after(error.response.headers))
    if status in _NEVER:
        return _down(server, reason, _NEVER[status])
    if body.get("code") == "context_length_exceeded" or _TOO_LONG.search(message):
        return _overflow(message)
    if status >= 500:
        return Transient(reason, retry_after(error.response.headers))
    if parameter := _named(body.get("param"), message, removable):
        return Refusal(parameter, reason)
    if body.get("param") == "model":
        return _down(server, reason, "check the model's name")
    return RequestRefused(
        f"request to {server}", expected="an answer", seen=reason, fix="see the reason; the same request fails again"
    )


def _words(error: Any) -> str:
    """What the server says of it, in whichever of the usual shapes."""
    body: Any = error.body if error.body else error.message
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body
    if isinstance(body, list) and all(isinstance(one, dict) and "msg" in one for one in body):
        body = "; ".join(f"{_place(one.get('loc'))}: {one['msg']}" for one in body)
    return str(body)[:10_000]


def _place(loc: Any) -> str:
    return ".".join(map(str, loc)) if isinstance(loc, list) else str(loc or "")


def _named(param: Any, message: str, removable: Collection[str]) -> str | None:
    """The parameter that an error is about: as the server names it, or else the first in words that say as much."""
    root = re.split(r"[.\[]", str(param or ""))[0]
    if root in removable and (root != "max_tokens" or _UNSUPPORTED.search(message)):
        return root  # a limit on tokens that is merely too small or too large is another matter
    if root and root != "messages":
        return None
    if "system" in removable and _NO_SYSTEM.search(message):
        return "system"
    if root or not _UNSUPPORTED.search(message):
        return None  # what is said of messages may quote them
    places = {name: re.search(rf"(?<![a-z_]){name}(?![a-z_])", message) for name in removable if name != "system"}
    found = {name: place.start() for name, place in places.items() if place}
    return min(found, key=found.__getitem__, default=None)


_NUMBER = r"(?<!\d)\d{1,12}(?!\d)"  # of tokens; a server can write down more digits than can be read
_LIMITS = [
    re.compile(pattern, re.I)
    for pattern in (
        rf"max_model_len\W{{0,3}}({_NUMBER})",
        rf"context (?:length|window|size)\D{{0,24}}?({_NUMBER})",
        rf"(?:at most|less than|limit is|<=) ({_NUMBER})",
        rf"({_NUMBER}) maximum",
        rf"maximum\D{{0,60}}?({_NUMBER})",
    )
]


def _overflow(message: str) -> ContextOverflow:
    """The limit as one of the usual wordings has it, and what was asked for: the largest number above it."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", message)
    limit = next((int(found[1]) for pattern in _LIMITS if (found := pattern.search(text))), None)
    needed = None
    if limit:
        above = [int(number) for number in re.findall(_NUMBER, text) if limit < int(number) < 64 * limit]
        if parts := re.search(rf"({_NUMBER}) > {limit} - ({_NUMBER})", text):
            above = [int(parts[1]) + int(parts[2])]
        needed = max(above, default=None)
    return ContextOverflow(
        "prompt", limit=limit or None, needed=needed, fix="use fewer examples, or a model with more context"
    )


def retry_after(headers: Any) -> float | None:
    """Seconds from the headers Retry-After-Ms or Retry-After (seconds, or a date), None where they say nothing sound."""
    for header, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        if (value := headers.get(header)) is None:
            continue
        try:
            seconds = float(value) / scale
        except ValueError:
            seconds = _until(value)
        if not math.isnan(seconds):
            return min(max(seconds, 0.0), _LONGEST_WAIT_S)
    return None


def _until(date: str) -> float:
    """Seconds until a date, not a number where it is none."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
    except (ValueError, TypeError, IndexError, OverflowError):
        return math.nan


def _down(server: str, reason: str, fix: str) -> ClientDown:
    return ClientDown(server, expected="an answer", seen=reason, fix=fix)
