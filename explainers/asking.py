"""What explainers that ask a language model share: windows as lines of a prompt, one question asked, one phrase read.

Prompts are versioned files in ``prompts/``. Corpus text enters them as JSON strings, so no text can end its own quotes or
pose as an instruction. A reply that cannot be read is asked for once more and then fails: it is never used as an
explanation. Where the examples do not fit the model's context, the weakest are left out. Knows no explainer; the client is
the caller's.
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
LONGEST = 600  # characters; longer is a model that ran on, not a phrase

Read = TypeVar("Read", covariant=True)


@dataclass(frozen=True, slots=True)
class Form(Generic[Read]):
    """The form of a reply. ``read`` gives None for one that is not in it; ``retry`` asks again; errors say ``wanted``."""

    schema: Mapping[str, Any]
    read: Callable[[Response], Read | None]
    retry: str
    wanted: str


@cache
def read_prompt(name: str) -> dict[str, Any]:
    """A prompt by the name of its file, version included: system, question, retry, shots."""
    return tomllib.loads(files("explainers").joinpath(f"prompts/{name}.toml").read_text(encoding="utf-8"))


def require_client(explainer: str, client: Client | None) -> Client:
    """The client. Raises BadConfig where there is none."""
    if client is None:
        raise BadConfig(
            f"explainer {explainer!r}",
            expected="a client that reaches a language model",
            seen="none",
            fix="name one (--client vllm:MODEL or openai:MODEL), or use the explainer 'words', which needs none",
        )
    return client


def chat(prompt: Mapping[str, Any], lines: Sequence[str]) -> list[Message]:
    """The messages that ask about the windows in ``lines``: system, shots, question."""
    messages = [Message("system", prompt["system"].strip())]
    for shot in prompt["shots"]:
        messages.append(Message("user", f"{shot['user'].strip()}\n\n{prompt['question']}"))
        messages.append(Message("assistant", shot["assistant"].strip()))
    return [*messages, Message("user", "\n".join([*lines, "", prompt["question"]]))]


def active_lines(examples: ExplainExamples, shown: Sequence[Example], share: float) -> list[str]:
    """Marked windows, numbered from 1, each with the levels of its active tokens. ``share`` places the marks."""
    lines = ["Active:"]
    for number, example in enumerate(shown, 1):
        marks = spans(example.tokens, marked_tokens(example.activations, examples.threshold, share))
        lines.append(f"{number}. {quoted(render(example.text, marks))}")
        lines.append(f"   levels: {_levels(example, examples)}")
    return lines


def inactive_lines(silent: Sequence[Example], first: int) -> list[str]:
    """Unmarked windows, numbered from ``first``; nothing where there are none."""
    numbered = [f"{number}. {quoted(render(one.text, ()))}" for number, one in enumerate(silent, first)]
    return ["Not active:", *numbered] if numbered else []


def _levels(example: Example, examples: ExplainExamples) -> str:
    """The active tokens with their levels, "whale 9, sea 3"; tokens that need quotes get them."""
    pairs = zip(example.tokens, levels(example.activations, examples.threshold, examples.peak), strict=True)
    return ", ".join(f"{_plain(token)} {level}" for token, level in pairs if level)


def _plain(token: str) -> str:
    bare = token.strip()
    return bare if re.fullmatch(r"[\w'’-]+", bare) else quoted(token)


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """At most ``count`` of them, evenly spaced, order kept."""
    if len(examples) <= count:
        return list(examples)
    return [examples[index * len(examples) // count] for index in range(count)]


async def ask(
    client: Client, messages: Sequence[Message], form: Form[Read], *, seed: int, max_tokens: int
) -> tuple[Read | None, Response]:
    """What the reply says, asked for once more if it cannot be read, and the reply it was last looked for in.

    Raises ContextOverflow where the question does not fit, and what else the client raises.
    """
    response = await client.generate(messages, schema=form.schema, seed=seed, max_tokens=max_tokens)
    found = None if response.in_thought else form.read(response)
    if found is None:
        retry = [*messages, Message("assistant", response.text), Message("user", form.retry)]
        with contextlib.suppress(ContextOverflow):  # a long reply that cannot be read: no room to ask again
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
    """The explanation, and a note where not all of ``shown`` (active windows) fitted the context.

    ``question`` makes the messages for those of them that are shown. Raises ClientError where no reply can be read,
    ContextOverflow where not even one window fits.
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
    return text, f"the context held {len(shown)} of {asked} examples: the weakest were left out"


def _weakest_dropped(shown: Sequence[Example], overflow: ContextOverflow) -> list[Example]:
    """Fewer examples, the order kept: by as much as the overflow says, and by an eighth at least."""
    share = 0.75
    if overflow.limit is not None and overflow.needed is not None:
        share = min(overflow.limit / overflow.needed, 0.875)
    keep = min(int(len(shown) * share), len(shown) - 1)
    strongest = sorted(range(len(shown)), key=lambda index: (-shown[index].peak, index))[:keep]
    return [shown[index] for index in sorted(strongest)]


def read_object(response: Response, keys: Collection[str]) -> dict[str, Any] | None:
    """The one JSON object of a reply, or None: prose may stand around it, but it has exactly these keys, each once."""
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
        raise ValueError("a key twice")
    return dict(pairs)


def phrase(value: object) -> str | None:
    """An explanation on one line and without control characters, or None for what is none.

    That is: anything but a string, one without a word, of more than ``LONGEST`` characters, or with half a character in it.
    """
    if not isinstance(value, str) or any(unicodedata.category(letter) == "Cs" for letter in value):
        return None
    text = " ".join("".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in value).split())
    return text if len(text) <= LONGEST and re.search(r"\w", text) else None
