"""How one request is put to the kinds of server that speak the chat-completions protocol, and how a reply is read back.

They differ in how output is constrained: vLLM's server takes a schema, choices or a pattern of their own; others take a
JSON schema whose root must be an object, so anything else is wrapped in one and unwrapped from the reply. Parameters that
a server refused are left out from then on. Pure: reaches nobody.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from evalkit.records import Message, Response

__all__ = ["CONSTRAINTS", "Ask", "Constraints", "Dialect", "MalformedReply"]

Constraints: TypeAlias = Literal["auto", "vllm", "json_schema", "none"]
CONSTRAINTS: tuple[Constraints, ...] = ("auto", "vllm", "json_schema", "none")

_WRAP = "answer"
_WRAPPING_TOKENS = 16  # what {"answer": …} adds to a reply
# what can be left out when a server refuses it; a reply without is worth less, but it is a reply
_OPTIONAL = ("seed", "temperature", "top_logprobs", "logprobs", "response_format", "structured_outputs")


class MalformedReply(ValueError):
    """A reply with status 200 that is not what the protocol says."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as the contract of clients has it."""

    messages: Sequence[Message]
    schema: Mapping[str, Any] | None
    choices: Sequence[str] | None
    regex: str | None
    logprobs: int
    seed: int | None
    max_tokens: int


@dataclass(slots=True)
class Dialect:
    """What is known of one server. ``kind`` is None until it was asked what it is."""

    kind: Constraints | None = None
    refused: set[str] = field(default_factory=set)

    def body(self, ask: Ask) -> dict[str, Any]:
        """Parameters of the request, without model and temperature; ``extra_body`` holds what is not in the protocol."""
        body: dict[str, Any] = {
            "messages": [{"role": message.role, "content": message.content} for message in ask.messages],
            "max_tokens": ask.max_tokens,
        }
        if ask.seed is not None:
            body["seed"] = ask.seed
        if ask.logprobs:
            body |= {"logprobs": True, "top_logprobs": ask.logprobs}
        if self.kind == "vllm" and (constraint := _own(ask)):
            body["extra_body"] = {"structured_outputs": constraint}
        elif self._wraps(ask) or (self.kind == "json_schema" and ask.schema is not None):
            schema = _wrapped(ask) if self._wraps(ask) else ask.schema
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "reply", "schema": schema, "strict": True},
            }
            body["max_tokens"] += _WRAPPING_TOKENS if self._wraps(ask) else 0
        if "logprobs" in self.refused or "top_logprobs" in self.refused:
            body.pop("top_logprobs", None)
        if "structured_outputs" in self.refused:
            body.pop("extra_body", None)
        if "max_tokens" in self.refused:  # the name that newer models take
            body["max_completion_tokens"] = body["max_tokens"]
        for name in self.refused:
            body.pop(name, None)
        return body

    def refuse(self, parameter: str) -> bool:
        """Leave a parameter out from now on; False where that cannot be, or was done already."""
        if parameter in self.refused or parameter not in (*_OPTIONAL, "max_tokens"):
            return False
        self.refused.add(parameter)
        return True

    def read(self, ask: Ask, completion: Any) -> Response:
        """The reply in a completion object of the SDK. Raises MalformedReply."""
        try:
            choice = completion.choices[0]
            text = choice.message.content or ""
            usage = completion.usage
            prompt_tokens, completion_tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
            logprobs = _logprobs(choice.logprobs)
        except (AttributeError, IndexError, TypeError, KeyError) as error:
            raise MalformedReply(f"a reply without {str(error)[:80]}") from error
        if not isinstance(text, str):
            raise MalformedReply(f"a reply whose content is {type(text).__name__}")
        return Response(
            text=self._unwrapped(ask, text),
            logprobs=logprobs,
            prompt_tokens=int(prompt_tokens or 0),
            completion_tokens=int(completion_tokens or 0),
            finish_reason=choice.finish_reason or "stop",
            model=str(completion.model or ""),
        )

    def _wraps(self, ask: Ask) -> bool:
        """Whether the constraint has to be wrapped in an object. A first token with log-probabilities cannot be."""
        if self.kind != "json_schema" or "response_format" in self.refused:
            return False
        if ask.schema is not None:
            return ask.schema.get("type") != "object"
        return (ask.choices is not None or ask.regex is not None) and not ask.logprobs

    def _unwrapped(self, ask: Ask, text: str) -> str:
        if not self._wraps(ask):
            return text
        try:
            inside = json.loads(text)[_WRAP]
        except (ValueError, KeyError, TypeError):
            return text  # not what was asked for: the reader of the answer says so
        return json.dumps(inside) if ask.schema is not None else str(inside)


def _own(ask: Ask) -> dict[str, Any]:
    """vLLM's structured outputs."""
    if ask.schema is not None:
        return {"json": dict(ask.schema)}
    if ask.choices is not None:
        return {"choice": list(ask.choices)}
    return {"regex": ask.regex} if ask.regex is not None else {}


def _wrapped(ask: Ask) -> dict[str, Any]:
    inside: dict[str, Any]
    if ask.schema is not None:
        inside = dict(ask.schema)
    elif ask.choices is not None:
        inside = {"type": "string", "enum": list(ask.choices)}
    else:
        inside = {"type": "string", "pattern": ask.regex}
    return {"type": "object", "properties": {_WRAP: inside}, "required": [_WRAP], "additionalProperties": False}


def _logprobs(found: Any) -> tuple[dict[str, float], ...]:
    if found is None or found.content is None:
        return ()
    return tuple({one.token: float(one.logprob) for one in token.top_logprobs} for token in found.content)
