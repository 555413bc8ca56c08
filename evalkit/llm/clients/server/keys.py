"""Protects the API key: it is read from the environment only, and never reaches a file, an error or a log.

Rejects client options that contain a key, because options are written to files, and cuts the key out of the texts of
servers and libraries. Reads one environment variable; knows no client.
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

# loggers of the openai SDK and of the HTTP libraries that its versions use
_CORES = [f"{core}.{part}" for core in ("httpcore", "httpcore2") for part in ("connection", "http11", "http2", "proxy")]
_LOGGERS = ("openai._base_client", "httpx", "httpx2", *_CORES)
_SECRET_FIELD = re.compile(r'[_"-](?:key|token|secret|password|authorization)":', re.I)


class Redactor:
    """Cuts a secret out of texts, so that a server that repeats it cannot make us write it to a file.

    ``least``: a secret with fewer characters is a placeholder and is not cut out.
    ``piece``: pieces of the secret with this many characters are cut out too, because a text may hold only part of it.
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
    """Cuts the secret out of log records."""

    def __init__(self, secret: str) -> None:
        super().__init__()
        self._secret, self._redact = secret, Redactor(secret, piece=8)

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if (cut := self._redact(text)) != text:
            record.msg, record.args = cut, ()
        return True

    def __eq__(self, other: object) -> bool:  # a logger adds equal filters only once
        return isinstance(other, _KeyFilter) and other._secret == self._secret

    def __hash__(self) -> int:
        return hash(self._secret)


def guard_logs(secret: str) -> None:
    """Cut the secret out of the logs of HTTP libraries, which contain headers and error texts of servers."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_KeyFilter(secret))


def checked_url(url: Any, redact: Redactor) -> str:
    """The base URL, without a trailing slash. Raises BadConfig if it is malformed or holds a secret, without quoting it."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, TypeError, AttributeError):
        sound = False
    if not sound or re.search(r"[\s\\]", url):
        begins = str(url).startswith(("http://", "https://"))
        seen = "an invalid host or port" if begins else "a URL with another beginning"
        raise BadConfig("base URL", expected="http://HOST:PORT/v1 or https://…", seen=seen, fix="give the whole URL")
    holds_key = redact(url) != url
    if holds_key or "@" in parts.netloc or parts.query or parts.fragment:
        raise BadConfig(
            "base URL" if holds_key else f"base URL of {parts.hostname}",
            expected="no user name, password, query or API key in it, as keys come from the environment",
            seen="one of these",
            fix="remove it, and set OPENAI_API_KEY",
        )
    return str(url).rstrip("/")


def read_key(variable: str) -> str | None:
    """The key in an environment variable; None if it is not set. Raises BadConfig if it cannot be a key."""
    key = os.environ.get(variable, "").strip() or None
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise BadConfig(
            f"environment variable {variable}",
            expected="an API key of ASCII letters, digits and signs, without spaces",
            seen="other characters",
            fix="set it again, without characters that a terminal or an editor added",
        )
    return key


def checked_fields(fields: Any, redact: Redactor) -> dict[str, Any]:
    """Check the further fields of a request. They become part of the client's name, so they must not contain a secret.

    Raises BadConfig, which quotes no value.
    """
    try:
        text = json.dumps(dict(fields or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _bad_fields("a JSON object", type(fields).__name__) from error
    if reserved := {"model", "messages", "stream"} & set(fields or {}):
        raise _bad_fields("no field named model, messages or stream", " and ".join(sorted(reserved)))
    if redact(text) != text or _SECRET_FIELD.search(text):
        raise _bad_fields("no API key or password, as keys come from the environment", "one of these")
    return json.loads(text)  # type: ignore[no-any-return]


def _bad_fields(expected: str, seen: str) -> BadConfig:
    return BadConfig("extra_body of client 'openai'", expected=expected, seen=seen, fix="correct it or leave it out")
