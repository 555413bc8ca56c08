"""Translates requests into the dialects of the chat-completions protocol, and reads the replies.

Servers differ in how output is constrained: vLLM's server accepts a schema, choices or a pattern in a field of its own;
others accept a JSON schema whose root must be an object, so anything else is wrapped in one and unwrapped from the reply.
A parameter that a server rejected is left out, or written another way, from then on. Makes no API calls.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from evalkit.llm.requests.chat_template import without_system
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Response

__all__ = ["CONSTRAINTS", "REMOVABLE", "Constraints", "Dialect", "Form", "MalformedReply", "read_reply"]

Constraints: TypeAlias = Literal["auto", "vllm", "json_schema", "none"]
CONSTRAINTS: tuple[Constraints, ...] = ("auto", "vllm", "json_schema", "none")

_WRAP = "answer"
_MOST_LOGPROBS = 20  # candidates per token; the largest number that the protocol allows
_WRAPPING_TOKENS = 16  # allowance for the tokens that {"answer": …} adds to a reply
# What is left out, reduced or written another way if a server rejects it: a less constrained reply is better than none.
# In the order in which they are suspected if the server names none.
REMOVABLE = (
    *("system", "response_format", "structured_outputs", "top_logprobs", "logprobs"),
    *("temperature", "seed", "max_tokens"),
)
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


class MalformedReply(ValueError):
    """A reply with status 200 that does not follow the protocol."""


@dataclass(frozen=True, slots=True)
class Form:
    """A request in a server's dialect.

    ``body``: fields of the protocol, without the model's name.
    ``extra``: fields that are not in the protocol.
    ``wrapped``: whether the reply is wrapped in an object.
    """

    body: dict[str, Any]
    extra: dict[str, Any]
    wrapped: bool

    @property
    def removable(self) -> set[str]:
        """The parameters that can be left out or written another way."""
        sent = {*self.body, *self.extra, self.body["messages"][0]["role"]}
        return sent.intersection(REMOVABLE)


@dataclass(slots=True)
class Dialect:
    """The dialect of one server.

    ``kind``: how it accepts constraints; None until that is known.
    ``refused``: parameters that it rejected; "top_logprobs=5" if it returns at most 5 candidates per token.
    ``unexplained``: signatures of errors that no parameter is to blame for.
    """

    kind: Constraints | None = None
    refused: set[str] = field(default_factory=set)
    unexplained: set[str] = field(default_factory=set)

    def put(self, request: GenerateRequest, temperature: float | None = 0.0) -> Form:
        """The request in this server's dialect. ``temperature``: None leaves it to the server."""
        wrapped = self._wraps(request)
        messages = without_system(request.messages) if "system" in self.refused else request.messages
        body: dict[str, Any] = {
            "messages": [{"role": message.role, "content": _encodable(message.content)} for message in messages],
            "max_tokens": request.max_tokens + (_WRAPPING_TOKENS if wrapped else 0),
        }
        if temperature is not None:
            body["temperature"] = temperature
        if request.seed is not None:
            body["seed"] = request.seed
        if request.logprobs:
            body |= {"logprobs": True, "top_logprobs": min(request.logprobs, self._most_logprobs())}
        if wrapped or (self.kind == "json_schema" and request.schema is not None):
            schema = _wrapped(request) if wrapped else _typed(request.schema)
            form = {"name": "reply", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        own = _own(request) if self.kind == "vllm" else {}
        if "max_tokens" in self.refused:  # the name that newer models expect
            body["max_completion_tokens"] = body["max_tokens"]
        for name in self.refused | ({"top_logprobs"} if "logprobs" in self.refused else set()):
            body.pop(name, None)
        return Form(body, {"structured_outputs": own} if own else {}, wrapped)

    def without(self, parameter: str) -> Dialect:
        """A copy that leaves out one more parameter."""
        other = Dialect(self.kind, set(self.refused))
        other.refuse(parameter)
        return other

    def refuse(self, parameter: str, sent: int | None = None) -> bool:
        """Leave a parameter out from now on; returns whether it was still in use.

        Of ``top_logprobs`` fewer are asked for: as many as the server said, else half of ``sent``; with none left, none.
        """
        if parameter == "top_logprobs" or parameter.startswith("top_logprobs="):
            told = int(parameter.partition("=")[2] or 0)
            before = min(self._most_logprobs(), sent or _MOST_LOGPROBS)
            most = told if 0 < told < before else (sent or before) // 2
            if most >= self._most_logprobs():
                return False
            parameter = f"top_logprobs={most}" if most else "top_logprobs"
        new = parameter not in self.refused
        self.refused.add(parameter)
        if parameter == "structured_outputs" and self.kind == "vllm":
            self.kind = "json_schema"  # the usual way for servers that accept constraints at all
        return new

    def _most_logprobs(self) -> int:
        limits = [name.partition("=")[2] for name in self.refused if name.startswith("top_logprobs=")]
        return min((int(limit) for limit in limits if limit.isdigit()), default=_MOST_LOGPROBS)

    def _wraps(self, request: GenerateRequest) -> bool:
        """Whether the constraint has to be wrapped in an object.

        Not with log-probabilities: the first token would belong to the wrapping.
        """
        if self.kind != "json_schema" or "response_format" in self.refused:
            return False
        if request.schema is not None:
            return request.schema.get("type") != "object"
        return (request.choices is not None or request.regex is not None) and not request.logprobs


def read_reply(request: GenerateRequest, form: Form, completion: Any) -> Response:
    """The reply in a completion object of the SDK. Raises MalformedReply."""
    if isinstance(completion, str):  # the reply has another content type
        raise MalformedReply(f"a reply that is not JSON: {completion[:2000]!r}")
    try:
        choice = completion.choices[0]
        text = _text(choice.message.content)
        if text is None:  # a model that declines uses another field
            text = getattr(choice.message, "refusal", None) or ""
        told, usage = getattr(completion, "model", None), getattr(completion, "usage", None)
    except (AttributeError, IndexError, TypeError, KeyError) as error:
        raise MalformedReply(f"a reply without choices: {getattr(completion, 'error', None) or error}") from error
    if not isinstance(text, str):
        raise MalformedReply(f"a reply whose content is not text but {type(text).__name__}")
    reason = getattr(choice, "finish_reason", None)
    if reason == "error":  # a router's provider failed after the router had answered with status 200
        raise MalformedReply(f"a reply that ended in an error: {getattr(choice, 'error', None) or text[:200]}")
    return Response(
        text=_encodable(_unwrapped(request, text) if form.wrapped else text),
        logprobs=_logprobs(getattr(choice, "logprobs", None)) if request.logprobs else (),
        prompt_tokens=_count(getattr(usage, "prompt_tokens", 0)),
        completion_tokens=_count(getattr(usage, "completion_tokens", 0)),
        finish_reason=reason if isinstance(reason, str) else "stop",
        model=told if isinstance(told, str) else "",
    )


def _text(content: Any) -> Any:
    """The content as one text where it comes in parts. Parts of other kinds, for example thoughts, are left out."""
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, Mapping) else getattr(part, "__dict__", {}) for part in content]
    if not all(isinstance(part.get("type"), str) for part in parts):
        return content
    texts = [part.get("text") for part in parts if part["type"] in ("text", "output_text")]
    return "".join(text for text in texts if isinstance(text, str))


def _encodable(text: str) -> str:
    """The text without lone surrogates, such as cut texts end in, which can be neither sent nor stored."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _own(request: GenerateRequest) -> dict[str, Any]:
    """The request's constraint as vLLM's ``structured_outputs``; empty without a constraint."""
    if request.schema is not None:
        return {"json": dict(request.schema)}
    if request.choices is not None:
        return {"choice": list(request.choices)}
    return {"regex": request.regex} if request.regex is not None else {}


def _wrapped(request: GenerateRequest) -> dict[str, Any]:
    inside: dict[str, Any]
    if request.schema is not None:
        inside = _typed(request.schema)
    elif request.choices is not None:
        inside = {"type": "string", "enum": list(request.choices)}
    else:
        inside = {"type": "string", "pattern": request.regex}
    return {"type": "object", "properties": {_WRAP: inside}, "required": [_WRAP], "additionalProperties": False}


def _typed(schema: Any) -> Any:
    """The schema with a ``type`` at every enumeration of values of one type: strict servers reject one without it."""
    if isinstance(schema, list):
        return [_typed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {key: value if key in ("enum", "const") else _typed(value) for key, value in schema.items()}
    values = found.get("enum")
    if isinstance(values, list) and "type" not in found:
        types = {_TYPES.get(type(value)) for value in values}
        if len(types) == 1 and None not in types:
            found["type"] = types.pop()
    return found


def _unwrapped(request: GenerateRequest, text: str) -> str:
    try:
        inside = json.loads(text)[_WRAP]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return text  # not the requested form, which the reader of the answer will report
    return json.dumps(inside) if request.schema is not None else str(inside)


def _count(value: Any) -> int:
    """A number of tokens; 0 if the server's value is not a plausible one."""
    return int(value) if isinstance(value, int | float) and 0 < value < 1e12 else 0


def _logprobs(found: Any) -> tuple[dict[str, float], ...]:
    """The candidates of every token; empty if they do not follow the protocol. Of equal spellings the likeliest is kept."""
    tokens = []
    try:
        for token in found.content or ():
            candidates: dict[str, float] = {}
            for one in (token, *(token.top_logprobs or ())):  # the generated token may be missing from the candidates
                if isinstance(one.token, str) and one.logprob is not None and not math.isnan(one.logprob):
                    best = candidates.get(one.token, -math.inf)
                    candidates[one.token] = max(best, min(float(one.logprob), 0.0))
            tokens.append(candidates)
    except (AttributeError, TypeError, ValueError, ArithmeticError):
        return ()
    return tuple(tokens)
