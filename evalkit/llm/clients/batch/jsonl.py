"""The lines of a batch's files: requests in the file that is uploaded, and their results in the files of the server.

Makes no API calls and writes nothing.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

from evalkit.errors import ClientError
from evalkit.llm.accounting.answer_store import KeyedRequest
from evalkit.llm.clients.batch.ledger import Batch
from evalkit.llm.clients.server.dialects import Dialect, Form, MalformedReply
from evalkit.llm.clients.server.endpoints import Endpoint
from evalkit.llm.clients.server.failures import Refusal, Transient, judge_failure
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Response

__all__ = ["URL", "Line", "Outcome", "cut_batch", "form_of", "outcome", "read_lines", "request_line"]

URL = "/v1/chat/completions"
_KEY = re.compile(rb'"custom_id"\s*:\s*"(\w{1,200})"')
Outcome: TypeAlias = Response | Refusal | Transient | ClientError


@dataclass(frozen=True, slots=True)
class Line:
    """The result of one request.

    ``status``: the HTTP status of the reply, 0 without a reply.
    ``body``: the reply's JSON.
    ``error``: why there is no reply.
    """

    key: str
    status: int
    body: Any
    error: str = ""


def request_line(key: str, body: dict[str, Any]) -> bytes:
    """A line of the file that is uploaded, with its newline. The server returns the key with the answer."""
    line = {"custom_id": key, "method": "POST", "url": URL, "body": body}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"  # ASCII: no other line break can occur


def form_of(request: KeyedRequest) -> str:
    """The parts of a request that a server might reject: the names of its fields and the keys of its schema.

    Values do not count, so many requests share a form.
    """
    content = request.content()
    fields = [
        name for name in ("schema", "choices", "regex", "logprobs", "seed") if getattr(content, name) not in (None, 0)
    ]
    system = ["system"] if content.messages and content.messages[0].role == "system" else []
    return " ".join([*system, *fields, *sorted(_keys(content.schema))])


def _keys(schema: Any) -> set[str]:
    if isinstance(schema, Mapping):
        return set(schema).union(*map(_keys, schema.values()))
    return set().union(*map(_keys, schema)) if isinstance(schema, list) else set()


def cut_batch(
    requests: Mapping[str, KeyedRequest], endpoint: Endpoint, dialect: Dialect, most_requests: int, most_bytes: int
) -> Batch:
    """A batch of the first of these requests, as many as fit both limits, but at least one."""
    chosen: dict[str, KeyedRequest] = {}
    lines: list[bytes] = []
    left = most_bytes
    for key, request in itertools.islice(requests.items(), most_requests):
        line = request_line(key, endpoint.body(endpoint.form(request.content(), dialect)))
        left -= len(line)
        if chosen and left < 0:
            break
        chosen[key] = request
        lines.append(line)
    return Batch(secrets.token_hex(8), chosen, dialect, lines=lines)


def read_lines(content: bytes) -> tuple[list[Line], int]:
    """The lines of a server's file, the first one per key, and the number of unreadable lines that name no request.

    An unreadable line that names its request counts as a request without a reply. A last line that is cut off is ignored.
    """
    found: dict[str, Line] = {}
    unread: dict[str, Line] = {}
    unreadable = 0
    *texts, last = content.split(b"\n")
    for text in (*texts, last if _read(last) else b""):
        if text.strip():
            if (line := _read(text)) is not None:
                found.setdefault(line.key, line)
            elif (line := _unread(text)) is not None:
                unread[line.key] = line
            elif text.lstrip().startswith(b"{"):  # otherwise it is from the HTML page of a gateway
                unreadable += 1
    return list((unread | found).values()), unreadable


def _unread(text: bytes) -> Line | None:
    named = _KEY.search(text)
    return Line(named[1].decode(), 0, None, "an unreadable line in the server's file") if named else None


def _read(text: bytes) -> Line | None:
    try:
        content = json.loads(text)
        key, response, error = content["custom_id"], content.get("response"), content.get("error")
        if response:
            return Line(str(key), int(response["status_code"]), response.get("body"))
        told = error if isinstance(error, dict) else {}
        return Line(str(key), 0, None, f"{told.get('code') or 'no code'}: {told.get('message') or 'no reason'}")
    except (ValueError, ArithmeticError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def outcome(line: Line, request: GenerateRequest, form: Form, endpoint: Endpoint, server: str) -> Outcome:
    """The meaning of a line: a reply, a rejected parameter (Refusal), a reason to retry (Transient) or a final error."""
    if line.status == 0:
        return Transient(endpoint.redact(line.error)[:200])
    try:
        if line.status != 200:
            return judge_failure(_status_error(line), server, form.removable, endpoint.redact)
        completion = json.loads(json.dumps(line.body), object_hook=lambda found: SimpleNamespace(**found))
        return endpoint.read(request, form, completion)
    except MalformedReply as error:
        return Transient(endpoint.redact(str(error))[:200])
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        return Transient(endpoint.redact(f"an unreadable reply: {error}")[:200])


def _status_error(line: Line) -> Any:
    """The line as an object with the attributes of the SDK's APIStatusError."""
    inside = line.body.get("error", line.body) if isinstance(line.body, dict) else line.body
    response = SimpleNamespace(headers={})
    return SimpleNamespace(status_code=line.status, body=inside, message=str(inside), response=response)
