"""What the two ends of a sender's pipes say to each other: one JSON object a line. Knows neither end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from evalkit import errors
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Message, Response

__all__ = [
    "from_line",
    "packed_error",
    "packed_request",
    "packed_response",
    "to_line",
    "unpacked_error",
    "unpacked_request",
    "unpacked_response",
]


def to_line(content: Mapping[str, Any]) -> bytes:
    """The line, its end included. Log-probabilities may be infinite: both ends are Python."""
    return json.dumps(content).encode() + b"\n"


def from_line(line: bytes) -> dict[str, Any]:
    """What a line says. Raises ValueError."""
    return dict(json.loads(line))


def packed_request(request: GenerateRequest) -> dict[str, Any]:
    """A request."""
    return {"messages": [asdict(message) for message in request.messages], "options": request.options()}


def unpacked_request(packed: Mapping[str, Any]) -> GenerateRequest:
    """The request again."""
    return GenerateRequest([Message(**message) for message in packed["messages"]], **packed["options"])


def packed_response(response: Response) -> dict[str, Any]:
    """A reply."""
    return asdict(response)


def unpacked_response(packed: Mapping[str, Any]) -> Response:
    """The reply again."""
    return Response(**{**packed, "logprobs": tuple(packed["logprobs"])})


def packed_error(error: Exception) -> dict[str, Any]:
    """The error's nearest class that this package defines, its message and its fields."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind]
    message = str(error) if kinds else f"{type(error).__name__}: {error}"
    fields = {key: value for key, value in vars(error).items() if isinstance(value, str | int | None)} if kinds else {}
    return {"kind": kinds[0] if kinds else None, "message": message, "fields": fields}


def unpacked_error(packed: Mapping[str, Any]) -> Exception:
    """The error again; a ``RuntimeError`` for one that this package does not define."""
    if packed["kind"] is None:
        return RuntimeError(packed["message"])
    kind = getattr(errors, packed["kind"])
    error: Exception = kind.__new__(kind, packed["message"])
    vars(error).update(packed["fields"])
    return error
