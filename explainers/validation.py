"""Validates candidate explanations on held-out windows: queries the client which of these windows each explanation fits.

Windows are shown without marks, in a hashed order that mixes both labels, several per request; the reply is a list of 0 and
1. The windows come from the explain pool, never from the score pool. The prompt is the versioned file
``prompts/validation_v1.toml``. Pure, except for calls to the client, which the caller provides.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from evalkit.errors import ContextOverflow, RequestRefused
from evalkit.markup import quoted
from evalkit.protocols import Client
from evalkit.records import Example, Message, Response
from evalkit.seeds import derive_request_seed
from explainers.asking import Form, ask, read_prompt

__all__ = ["Validation", "held_back", "parse_verdicts", "validate", "validation_prompt"]

_PROMPT = read_prompt("validation_v1")
_TOKENS_PER_ANSWER, _TOKENS_AROUND = 4, 16
_LIST = re.compile(r"\s*(?:```(?:json)?)?\s*(\[[^\[\]]*\])\s*(?:```)?\s*")


@dataclass(frozen=True, slots=True)
class Validation:
    """The result of validating one explanation.

    ``score``: balanced accuracy; None if either class has no verdict.
    ``n_read``: the number of windows with a verdict.
    """

    score: float | None
    n_read: int


def held_back(windows: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """``count`` held-out windows, and the others, both in the order of ``windows``.

    The windows are cut into ``count`` runs of neighbours, and a hash picks one window per run. If they are sorted by
    strength, the held-out windows therefore cover all strengths.
    """
    bounds = [number * len(windows) // count for number in range(count + 1)] if count else []
    picked = {
        min(range(first, last), key=lambda place: (derive_request_seed(seed, windows[place].window), place))
        for first, last in itertools.pairwise(bounds)
        if first < last
    }
    split = [[one for place, one in enumerate(windows) if (place in picked) == wanted] for wanted in (True, False)]
    return split[0], split[1]


async def validate(
    client: Client,
    text: str,
    active: Sequence[Example],
    inactive: Sequence[Example],
    *,
    batch_size: int,
    seed: int,
    thinking_tokens: int = 0,
) -> Validation:
    """How well the explanation ``text`` separates active from inactive windows.

    Sends ⌈windows / ``batch_size``⌉ requests, and one retry for each unreadable reply. If a request is rejected, or the
    retry is unreadable too, its windows have no verdict. Raises any other error of the client.
    """
    labelled = [(one, True) for one in active] + [(one, False) for one in inactive]
    labelled.sort(key=lambda pair: derive_request_seed(seed, pair[0].window))
    batches = [labelled[first : first + batch_size] for first in range(0, len(labelled), batch_size)]
    asked = (_verdicts(client, text, [one for one, _ in batch], seed, thinking_tokens) for batch in batches)
    right: dict[bool, list[bool]] = {True: [], False: []}
    for batch, verdicts in zip(batches, await asyncio.gather(*asked), strict=True):
        for (_, label), verdict in zip(batch, verdicts, strict=True):
            if verdict is not None:
                right[label].append(verdict == label)
    shares = [sum(told) / len(told) for told in right.values() if told]
    return Validation(sum(shares) / 2 if len(shares) == 2 else None, sum(map(len, right.values())))


async def _verdicts(
    client: Client, text: str, batch: Sequence[Example], seed: int, thinking_tokens: int
) -> Sequence[bool | None]:
    """One verdict per window, None if there is none. A batch that does not fit the context is split in two."""
    count = len(batch)
    form = Form(
        schema={"type": "array", "items": {"enum": [0, 1]}, "minItems": count, "maxItems": count},
        read=lambda response: parse_verdicts(response, count),
        retry=_PROMPT["retry"],
        wanted=f"a list of {count} numbers",
    )
    room = _TOKENS_PER_ANSWER * count + _TOKENS_AROUND + thinking_tokens
    try:
        found, _ = await ask(client, validation_prompt(text, batch), form, seed=seed, max_tokens=room)
    except RequestRefused:
        return [None] * count
    except ContextOverflow:
        if count == 1:
            return [None]
        halves = (batch[: count // 2], batch[count // 2 :])
        told = await asyncio.gather(*(_verdicts(client, text, half, seed, thinking_tokens) for half in halves))
        return [verdict for half in told for verdict in half]
    return [None] * count if found is None else found


def validation_prompt(text: str, windows: Sequence[Example]) -> list[Message]:
    """The chat messages that ask which of the windows the explanation fits."""
    messages = [Message("system", _PROMPT["system"].strip())]
    for shot in _PROMPT["shots"]:
        messages.append(Message("user", _question(shot["description"], shot["texts"])))
        messages.append(Message("assistant", json.dumps(shot["answers"])))
    return [*messages, Message("user", _question(text, [one.text for one in windows]))]


def _question(description: str, texts: Sequence[str]) -> str:
    numbered = [f"{number}. {quoted(text)}" for number, text in enumerate(texts, 1)]
    wanted = "1 number" if len(texts) == 1 else f"{len(texts)} numbers"
    return "\n".join([f"Description: {quoted(description)}", "Texts:", *numbered, f"Reply with a list of {wanted}."])


def parse_verdicts(response: Response, count: int) -> tuple[bool, ...] | None:
    """The verdicts of a reply; None unless it is one JSON list of ``count`` numbers, each 0 or 1, and nothing else."""
    found = _LIST.fullmatch(response.answer)
    if found is None:
        return None
    try:
        values = json.loads(found[1])
    except ValueError:
        return None
    if len(values) != count or not all(type(value) is int and value in (0, 1) for value in values):
        return None
    return tuple(value == 1 for value in values)
