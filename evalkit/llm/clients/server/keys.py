"""The key of an API: it comes from the environment, and no other way in or out is left open.

Checks what a user gives a client for keys that would be written down with it, and cuts the key out of what servers and
libraries say. Reads one environment variable; knows no client.
"""

from __future__ import annotations

import json
import logging
import os
import re
from typing import Any
from urllib.parse import urlsplit

from evalkit.errors import BadConfig

__all__ = ["Redactor", "checked_fields", "checked_url", "guard_logs", "read_key"]

# of the openai SDK and of the HTTP libraries that its versions stand on
_CORES = [f"{core}.{part}" for core in ("httpcore", "httpcore2") for part in ("connection", "http11", "http2", "proxy")]
_LOGGERS = ("openai._base_client", "httpx", "httpx2", *_CORES)
_SECRET_FIELD = re.compile(r'[_"-](?:key|token|secret|password|authorization)":', re.I)


class Redactor:
    """Cuts a secret out of texts, so that no server can make us write it down.

    ``least``: anything shorter is a placeholder, no secret. ``piece``: parts of the secret of so many characters go too,
    for whoever wrote the text may have cut the secret in two.
    """

    def __init__(self, secret: str | None, *, least: int = 4, piece: int | None = None) -> None:
        self._secret = secret if secret and len(secret) >= least else None
        self._size = piece or 0
        ends = range(self._size, len(self._secret or "") + 1) if piece else ()
        self._pieces = {(self._secret or "")[end - self._size : end] for end in ends}

    def __call__(self, text: str) -> str:
        if self._secret is None:
            return text
        text = text.replace(self._secret, "[key]")
        return self._without_pieces(text) if self._pieces else text

    def _without_pieces(self, text: str) -> str:
        kept, place = [], 0
        while place < len(text):
            end = place
            while text[end : end + self._size] in self._pieces:
                end += 1
            kept.append("[key]" if end > place else text[place])
            place = end + self._size - 1 if end > place else place + 1
        return "".join(kept)


class _KeyFilter(logging.Filter):
    """Rewrites log records that hold the secret."""

    def __init__(self, secret: str) -> None:
        super().__init__()
        self._secret, self._redact = secret, Redactor(secret, piece=8)

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if (cut := self._redact(text)) != text:
            record.msg, record.args = cut, ()
        return True

    def __eq__(self, other: object) -> bool:  # a logger takes equal filters once
        return isinstance(other, _KeyFilter) and other._secret == self._secret

    def __hash__(self) -> int:
        return hash(self._secret)


def guard_logs(secret: str) -> None:
    """Cut the secret out of what the libraries below us log: headers and reasons as a server sent them."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_KeyFilter(secret))


def checked_url(url: Any, redact: Redactor) -> str:
    """A base URL that holds no secret. Raises BadConfig, which repeats nothing that might be one."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, TypeError, AttributeError):
        sound = False
    if not sound or re.search(r"[\s\\]", url):
        begins = str(url).startswith(("http://", "https://"))
        seen = "a host or port that cannot be" if begins else "another beginning"
        raise BadConfig("base URL", expected="http://HOST:PORT/v1 or https://…", seen=seen, fix="write it in full")
    holds_key = redact(url) != url
    if holds_key or "@" in parts.netloc or parts.query or parts.fragment:
        raise BadConfig(
            "base URL" if holds_key else f"base URL of {parts.hostname}",
            expected="no user name, password, query or key in it: keys come from the environment",
            seen="one of these",
            fix="take it out, and set OPENAI_API_KEY",
        )
    return str(url).rstrip("/")


def read_key(variable: str) -> str | None:
    """The key in an environment variable, None where there is none. Raises BadConfig."""
    key = os.environ.get(variable, "").strip() or None
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise BadConfig(
            f"environment variable {variable}",
            expected="a key: letters, digits and signs, without spaces",
            seen="other characters",
            fix="set it again, without what a terminal or an editor added",
        )
    return key


def checked_fields(fields: Any, redact: Redactor) -> dict[str, Any]:
    """Further fields of a request. They become part of the client's name, so no secret may be among them.

    Raises BadConfig, which repeats no value.
    """
    try:
        text = json.dumps(dict(fields or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _bad_fields("a JSON object", type(fields).__name__) from error
    if reserved := {"model", "messages", "stream"} & set(fields or {}):
        raise _bad_fields("fields beside model and messages, and no stream", " and ".join(sorted(reserved)))
    if redact(text) != text or _SECRET_FIELD.search(text):
        raise _bad_fields("no key or password: keys come from the environment", "one of these")
    return json.loads(text)  # type: ignore[no-any-return]


def _bad_fields(expected: str, seen: str) -> BadConfig:
    return BadConfig("extra_body of client 'openai'", expected=expected, seen=seen, fix="correct it, or leave it out")
