"""The code that explainers with a language model share: write windows into a prompt, query the client, parse the phrase.

Prompts are versioned files in ``prompts/``. Corpus text enters them as JSON strings, so no text can end its own quotes or
pass for an instruction. If a reply cannot be parsed, the request is retried once; if that fails too, it raises: such a
reply is never used as an explanation. If the examples do not fit the model's context, the weakest are left out. Does not
know the explainers; the caller provides the client. Reads prompt files; writes nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Generic, TypeVar

from evalkit.errors import BadConfig, ClientError, ContextOverflow
from evalkit.markup import levels, marked_tokens, quoted, render, spans
from evalkit.protocols import Client
from evalkit.records import Example, ExplainExamples, Message, Response

__all__ = [
    "LONGEST",
    "PHRASE",
    "Form",
    "active_lines",
    "ask",
    "ask_for_phrase",
    "chat",
    "inactive_lines",
    "phrase",
    "read_object",
    "read_prompt",
    "require_client",
    "spread",
]

PHRASE = {"type": "string", "minLength": 1, "maxLength": 400}  # JSON schema of an explanation
LONGEST = 600  # characters; a longer text means that the model did not stop after the phrase

Read = TypeVar("Read", covariant=True)


@dataclass(frozen=True, slots=True)
class Form(Generic[Read]):
    """The form that a reply must have.

    ``schema``: JSON schema for clients that can constrain replies.
    ``read``: parses a reply; returns None if the reply does not have the form.
    ``retry``: the message that requests another reply after one that could not be parsed.
    ``wanted``: the form in words, for error messages.
    """

    schema: Mapping[str, Any]
    read: Callable[[Response], Read | None]
    retry: str
    wanted: str


@cache
def read_prompt(name: str) -> dict[str, Any]:
    """The prompt in the file ``prompts/NAME.toml``; the name includes the version. Keys: system, question, retry, shots."""
    return tomllib.loads(files("explainers").joinpath(f"prompts/{name}.toml").read_text(encoding="utf-8"))


def require_client(explainer: str, client: Client | None) -> Client:
    """The client itself. Raises BadConfig if it is None. ``explainer``: the name for the message."""
    if client is None:
        raise BadConfig(
            f"explainer {explainer!r}",
            expected="a client that reaches a language model",
            seen="none",
            fix="add --client vllm:MODEL or --client openai:MODEL, or use the explainer 'words', which needs no client",
        )
    return client


def chat(prompt: Mapping[str, Any], lines: Sequence[str]) -> list[Message]:
    """The messages of a request: system, shots, and the question about the windows in ``lines``."""
    messages = [Message("system", prompt["system"].strip())]
    for shot in prompt["shots"]:
        messages.append(Message("user", f"{shot['user'].strip()}\n\n{prompt['question']}"))
        messages.append(Message("assistant", shot["assistant"].strip()))
    return [*messages, Message("user", "\n".join([*lines, "", prompt["question"]]))]


def active_lines(examples: ExplainExamples, shown: Sequence[Example], share: float) -> list[str]:
    """Marked windows, numbered from 1, each with the levels of its active tokens.

    ``share``: where the marks are placed; see ``evalkit.markup.marked_tokens``.
    """
    lines = ["Active:"]
    for number, example in enumerate(shown, 1):
        marks = spans(example.tokens, marked_tokens(example.activations, examples.threshold, share))
        lines.append(f"{number}. {quoted(render(example.text, marks))}")
        lines.append(f"   levels: {_levels(example, examples)}")
    return lines


def inactive_lines(silent: Sequence[Example], first: int) -> list[str]:
    """Unmarked windows, numbered from ``first``. Empty if there are no windows."""
    numbered = [f"{number}. {quoted(render(one.text, ()))}" for number, one in enumerate(silent, first)]
    return ["Not active:", *numbered] if numbered else []


def _levels(example: Example, examples: ExplainExamples) -> str:
    """The active tokens with their levels, such as "whale 9, sea 3"; tokens other than plain words are quoted."""
    pairs = zip(example.tokens, levels(example.activations, examples.threshold, examples.peak), strict=True)
    return ", ".join(f"{_plain(token)} {level}" for token, level in pairs if level)


def _plain(token: str) -> str:
    bare = token.strip()
    return bare if re.fullmatch(r"[\w'’-]+", bare) else quoted(token)


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """At most ``count`` of the examples, evenly spaced and in the same order."""
    if len(examples) <= count:
        return list(examples)
    return [examples[index * len(examples) // count] for index in range(count)]


async def ask(
    client: Client, messages: Sequence[Message], form: Form[Read], *, seed: int, max_tokens: int
) -> tuple[Read | None, Response]:
    """The parsed reply, or None after one retry; and the last reply of the client.

    Raises ContextOverflow if the question does not fit the context, and any other error of the client.
    """
    response = await client.generate(messages, schema=form.schema, seed=seed, max_tokens=max_tokens)
    found = None if response.in_thought else form.read(response)
    if found is None:
        retry = [*messages, Message("assistant", response.text), Message("user", form.retry)]
        with contextlib.suppress(ContextOverflow):  # the unreadable reply may be too long to repeat it in a retry
            response = await client.generate(retry, schema=form.schema, seed=seed, max_tokens=max_tokens)
            found = None if response.in_thought else form.read(response)
    return found, response


async def ask_for_phrase(
    client: Client,
    examples: ExplainExamples,
    shown: Sequence[Example],
    question: Callable[[Sequence[Example]], Sequence[Message]],
    form: Form[str],
    *,
    seed: int,
    max_tokens: int,
) -> tuple[str, str]:
    """The explanation, and a note if the context was too small for some of the windows.

    ``shown``: the active windows to show.
    ``question``: makes the messages for those active windows that fit.

    Raises ClientError if no reply can be parsed, ContextOverflow if not even one window fits.
    """
    asked = len(shown)
    while True:
        try:
            text, response = await ask(client, question(shown), form, seed=seed, max_tokens=max_tokens)
            break
        except ContextOverflow as error:
            shown = _weakest_dropped(shown, error)
            if not shown:
                raise
    if text is None:
        raise ClientError(
            f"explanation of {examples.source} feature {examples.feature}",
            expected=form.wanted,
            seen=f"{response.text[:80]!r} ({response.finish_reason})",
            fix="use a model that follows instructions, or a client that constrains replies to a schema",
        )
    if len(shown) == asked:
        return text, ""
    return text, f"only {len(shown)} of {asked} examples fit the context; the weakest were left out"


def _weakest_dropped(shown: Sequence[Example], overflow: ContextOverflow) -> list[Example]:
    """The strongest of the examples, in the same order: as many as the overflow allows, at most seven eighths."""
    share = 0.75
    if overflow.limit is not None and overflow.needed is not None:
        share = min(overflow.limit / overflow.needed, 0.875)
    keep = min(int(len(shown) * share), len(shown) - 1)
    strongest = sorted(range(len(shown)), key=lambda index: (-shown[index].peak, index))[:keep]
    return [shown[index] for index in sorted(strongest)]


def read_object(response: Response, keys: Collection[str]) -> dict[str, Any] | None:
    """The only JSON object of a reply, or None. It must have exactly these keys, once each; prose may surround it."""
    found: list[dict[str, Any]] = []
    decoder = json.JSONDecoder(object_pairs_hook=_each_once)
    reply = response.answer
    place = reply.find("{")
    while place != -1:
        try:
            value, end = decoder.raw_decode(reply, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            found.append(value)
        place = reply.find("{", end)
    return found[0] if len(found) == 1 and set(found[0]) == set(keys) else None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def phrase(value: object) -> str | None:
    """The explanation as one line without control characters, or None if ``value`` is not an explanation.

    Not an explanation is anything but a string, and a string without a letter or digit, with more than ``LONGEST``
    characters, or with half a surrogate pair.
    """
    if not isinstance(value, str) or any(unicodedata.category(letter) == "Cs" for letter in value):
        return None
    text = " ".join("".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in value).split())
    return text if len(text) <= LONGEST and re.search(r"\w", text) else None
