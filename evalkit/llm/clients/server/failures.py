"""Decides what a failed request means: retry, retry without a parameter, give up the request, or give up the server.

Reads exceptions of the ``openai`` SDK; sends nothing. The API key is cut out of a server's text before it reaches an error
or a log.
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

__all__ = ["Refusal", "Transient", "judge_failure", "may_be_a_parameter", "retry_after", "signature"]

_AGAIN = frozenset({408, 409, 425, 429})  # retried, as is every status from 500
_NEVER = {
    401: "set the right API key in the environment; it is missing or wrong",
    402: "add credit to the account, which has none left",
    403: "use an API key that has access to this model",
    404: "check the model name and the base URL, which usually ends in /v1",
    405: "check the base URL, which usually ends in /v1",
}
_NO_CREDIT = ("insufficient_quota", "billing_not_active", "billing_hard_limit_reached")
_TOO_LONG = re.compile(
    r"context[ _](?:length|window|size)|maximum (?:model|context) len|too many tokens|prompt is too long|max_model_len"
    r"|input token count|max_(?:completion_)?tokens\W{1,3}is too large|max_new_tokens\W+must be <=",
    re.I,
)
_UNSUPPORTED = re.compile(
    r"unsupported|not supported|n't support|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed"
    r"|extra (?:field|input)|invalid|not implemented|not available|unavailable|not enabled|disabled|forbidden|\bonly\b",
    re.I,
)
_NO_SYSTEM = re.compile(
    r"\b(?:system|developer)\W{0,3} (?:role|message|prompt|instruction)s?\b.{0,30}(?:\bnot\b|n't|unsupported)"
    r"|\brole\W{1,3}(?:system|developer)\b|\broles? must (?:strictly )?alternate|\bonly user and assistant\b"
    r"|\bfirst message must\b.{0,20}\buser\b",
    re.I,
)
_MOST_LOGPROBS = re.compile(
    r"(?:at most|up to|less than or equal to|no (?:more|greater|larger) than|<=|≤|\bmax(?:imum)?(?: \w+)?(?: is| of|:)?"
    r"|between \d+ and|\[0, ?)\s*(?<!\d)(\d{1,3})(?!\d)",
    re.I,
)
# An error that may be about a parameter although it names none that was sent. With a status of _NEVER the usual meaning is
# another, so the words must say so; the other errors of a client's making may have any words.
_ABOUT_REQUEST = frozenset({400, 403, 404, 405, 415, 422})
_ABOUT_PARAMETERS = re.compile(r"parameter|feature|support|schema|logprob|format|\brole|field|option", re.I)
_LONGEST_WAIT_S = 300.0


class Transient(Exception):
    """A failure that is worth a retry.

    ``wait_s``: the pause that the server asks for, in seconds; None if it asks for none.
    ``silent``: whether there was no reply at all.
    """

    def __init__(self, reason: str, wait_s: float | None = None, *, silent: bool = False) -> None:
        self.reason, self.wait_s, self.silent = reason, wait_s, silent
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The server rejects ``parameter``."""

    parameter: str
    reason: str


def judge_failure(
    error: Any, server: str, removable: Collection[str], redact: Redactor
) -> Transient | Refusal | ClientError:
    """What an ``openai.APIStatusError`` means for a request whose ``removable`` parameters can be left out."""
    status, body = int(error.status_code), error.body if isinstance(error.body, dict) else {}
    message = _words(error)
    reason = f"status {status}: {redact(' '.join(message.split()))[:200]}"
    if any(name in (body.get("code"), body.get("type")) for name in _NO_CREDIT):
        return _down(server, reason, _NEVER[402])
    if status in _AGAIN:
        return Transient(reason, retry_after(error.response.headers))
    if status in (401, 402):
        return _down(server, reason, _NEVER[status])
    if body.get("code") == "context_length_exceeded" or (status not in _NEVER and _TOO_LONG.search(message)):
        return _overflow(message)
    if parameter := _named(body.get("param"), message, removable):
        return Refusal(_with_limit(parameter, message), reason)
    if status in _NEVER:
        return _down(server, reason, _NEVER[status])
    if status >= 500:
        return Transient(reason, retry_after(error.response.headers))
    if body.get("param") == "model":
        return _down(server, reason, "check the model name")
    return RequestRefused(
        f"request to {server}", expected="an answer", seen=reason, fix="see the reason; the same request fails again"
    )


def may_be_a_parameter(error: Any) -> bool:
    """Whether an ``openai.APIStatusError`` may reject a parameter without naming it.

    Then the request is worth trying without each of them. Never true of a wrong key, a rate limit or a server's failure.
    """
    status, message = int(error.status_code), _words(error)
    body = error.body if isinstance(error.body, dict) else {}
    if body.get("param") not in (None, "", "messages"):  # it names another parameter, which was asked for on purpose
        return False
    return status in _ABOUT_REQUEST and (status not in _NEVER or _ABOUT_PARAMETERS.search(message) is not None)


def signature(error: Any) -> str:
    """What an error says, without numbers and quoted text: equal for errors that differ in the request only."""
    return re.sub(r"(['\"`]).*?\1|\d+", "", f"{error.status_code} {_words(error)}")[:300]


def _with_limit(parameter: str, message: str) -> str:
    """``top_logprobs`` with the largest number that the server accepts, where its message says one."""
    found = _MOST_LOGPROBS.search(message) if parameter == "top_logprobs" else None
    return f"{parameter}={found[1]}" if found else parameter


def _words(error: Any) -> str:
    """The server's error message, from any of the usual forms of an error body."""
    body: Any = error.body if error.body else error.message
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body
    if isinstance(body, list) and all(isinstance(one, dict) and "msg" in one for one in body):
        body = "; ".join(f"{_place(one.get('loc'))}: {one['msg']}" for one in body)
    return str(body)[:10_000]


def _place(loc: Any) -> str:
    return ".".join(map(str, loc)) if isinstance(loc, list) else str(loc or "")


def _named(param: Any, message: str, removable: Collection[str]) -> str | None:
    """The removable parameter that the server rejects, or None.

    Taken from the error's ``param``, or else the first one named in a message that says something is unsupported.
    """
    root = re.split(r"[.\[]", str(param or ""))[0]
    if root == "messages" and "system" in removable and _NO_SYSTEM.search(message):
        return "system"
    if root in removable and (root != "max_tokens" or _UNSUPPORTED.search(message)):
        return root  # a max_tokens that is only too small or too large is not unsupported
    if root and root != "messages":
        return None
    if "system" in removable and _NO_SYSTEM.search(message):
        return "system"
    if root or not _UNSUPPORTED.search(message):
        return None  # an error about messages may quote the prompt
    places = {name: re.search(rf"(?<![a-z_-]){name}(?![a-z_-])", message) for name in removable if name != "system"}
    found = {name: place.start() for name, place in places.items() if place}
    return min(found, key=found.__getitem__, default=None)


_NUMBER = r"(?<!\d)\d{1,12}(?!\d)"  # of tokens; Python refuses to parse numbers with very many digits
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
    """Reads the limit from one of the usual wordings, and the tokens needed: the largest number above the limit."""
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
    """Seconds from the header Retry-After-Ms or Retry-After (seconds or a date); None without a valid one."""
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
    """Seconds until a date; NaN if it is not a date."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
    except (ValueError, TypeError, IndexError, OverflowError):
        return math.nan


def _down(server: str, reason: str, fix: str) -> ClientDown:
    return ClientDown(server, expected="an answer", seen=reason, fix=fix)
