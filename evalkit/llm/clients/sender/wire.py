"""The messages between a sender's two processes: one JSON object per line. Knows neither process."""

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
    """The line with its newline. Log-probabilities may be infinite, which Python's JSON reader on the other end accepts."""
    return json.dumps(content).encode() + b"\n"


def from_line(line: bytes) -> dict[str, Any]:
    """The content of a line. Raises ValueError."""
    return dict(json.loads(line))


def packed_request(request: GenerateRequest) -> dict[str, Any]:
    """A request as JSON values."""
    return {"messages": [asdict(message) for message in request.messages], "options": request.options()}


def unpacked_request(packed: Mapping[str, Any]) -> GenerateRequest:
    """The request that ``packed_request`` packed."""
    return GenerateRequest([Message(**message) for message in packed["messages"]], **packed["options"])


def packed_response(response: Response) -> dict[str, Any]:
    """A reply as JSON values."""
    return asdict(response)


def unpacked_response(packed: Mapping[str, Any]) -> Response:
    """The reply that ``packed_response`` packed."""
    return Response(**{**packed, "logprobs": tuple(packed["logprobs"])})


def packed_error(error: Exception) -> dict[str, Any]:
    """An error as JSON values: its nearest class that ``evalkit.errors`` defines, its message and its fields."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind]
    message = str(error) if kinds else f"{type(error).__name__}: {error}"
    fields = {key: value for key, value in vars(error).items() if isinstance(value, str | int | None)} if kinds else {}
    return {"kind": kinds[0] if kinds else None, "message": message, "fields": fields}


def unpacked_error(packed: Mapping[str, Any]) -> Exception:
    """The error that ``packed_error`` packed; a ``RuntimeError`` if no class of ``evalkit.errors`` fits."""
    if packed["kind"] is None:
        return RuntimeError(packed["message"])
    kind = getattr(errors, packed["kind"])
    error: Exception = kind.__new__(kind, packed["message"])
    vars(error).update(packed["fields"])
    return error
