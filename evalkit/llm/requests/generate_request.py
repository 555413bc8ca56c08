"""One request to a language model, as the modules of ``evalkit.llm`` pass it to each other, and its canonical JSON.

The recording's keys are hashes of that JSON, so its form must never change. Knows no server, client or file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from evalkit.records import Message

__all__ = ["GenerateRequest"]

_DEFAULTS: dict[str, Any] = {"schema": None, "choices": None, "regex": None, "logprobs": 0, "seed": None}


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """The arguments of ``evalkit.protocols.Client.generate``, which explains each of them."""

    messages: Sequence[Message]
    _: KW_ONLY
    schema: Mapping[str, Any] | None = None
    choices: Sequence[str] | None = None
    regex: str | None = None
    logprobs: int = 0
    seed: int | None = None
    max_tokens: int

    @classmethod
    def from_json(cls, text: str) -> GenerateRequest:
        """The request in JSON that ``canonical_json`` wrote; further fields are ignored."""
        content = json.loads(text)
        messages = [Message(message["role"], message["content"]) for message in content["messages"]]
        return cls(messages, **{name: content[name] for name in (*_DEFAULTS, "max_tokens")})

    def options(self) -> dict[str, Any]:
        """The keyword arguments for ``Client.generate``, without those that equal its defaults."""
        given = {name: getattr(self, name) for name, default in _DEFAULTS.items() if getattr(self, name) != default}
        return {**given, "max_tokens": self.max_tokens}

    def canonical_json(self, model: str) -> str:
        """The request to ``model`` as JSON with sorted keys, without spaces, in ASCII."""
        content = {
            "model": model,
            "messages": [asdict(message) for message in self.messages],
            "schema": self.schema,
            "choices": None if self.choices is None else list(self.choices),
            "regex": self.regex,
            "logprobs": self.logprobs,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
