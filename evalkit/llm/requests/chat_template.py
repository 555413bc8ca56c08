"""Turns chat messages into the tokens of a prompt, with the model's chat template or one from a file.

Reads the template file and writes nothing. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalkit.errors import ClientDown, MissingFile
from evalkit.records import Message

__all__ = ["ChatTemplate", "without_system"]


class ChatTemplate:
    """The template of one model.

    ``path``: a Jinja file to use instead of the model's template.
    ``options``: values for variables of the template.

    Raises MissingFile.
    """

    def __init__(self, path: str | None = None, options: dict[str, Any] | None = None) -> None:
        self._options = options or {}
        self._text = None
        self._no_system = False
        if path is not None:
            try:
                self._text = Path(path).expanduser().read_text(encoding="utf-8")
            except OSError as error:
                raise MissingFile(
                    path, expected="a chat template", seen=error.strerror or str(error), fix="check the path"
                ) from error

    def tokens(self, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
        """The tokens of the prompt for the assistant's next turn.

        If the template rejects system messages, the system message is put at the start of the first user message. Raises
        ClientDown if the model has no usable template.
        """
        if self._no_system:
            return self._apply(tokenizer, without_system(messages))
        try:
            return self._apply(tokenizer, messages)
        except Exception as error:  # a template may raise an error of any class and in any words
            shorter = without_system(messages)
            if shorter == list(messages):
                raise _unusable(error) from error
            try:
                tokens = self._apply(tokenizer, shorter)
            except Exception:
                raise _unusable(error) from error
        self._no_system = True
        return tokens

    def _apply(self, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
        text = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            chat_template=self._text,
            add_generation_prompt=True,
            tokenize=False,
            **self._options,
        )
        return list(tokenizer.encode(text, add_special_tokens=False))  # the template has added the special tokens


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with the system message at the start of the first user message."""
    if not messages or messages[0].role != "system":
        return list(messages)
    system, rest = messages[0], list(messages[1:])
    if rest and rest[0].role == "user":
        return [Message("user", f"{system.content}\n\n{rest[0].content}"), *rest[1:]]
    return [Message("user", system.content), *rest]


def _unusable(error: Exception) -> ClientDown:
    return ClientDown(
        "chat template",
        expected="a template that accepts these messages",
        seen=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        fix="use an instruction-tuned model, or name a template file with the client option chat_template",
    )
