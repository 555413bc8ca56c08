"""Queries a language model for the text of a group that does not belong with the others, one request per group.

The prompt is the versioned file ``prompts/pick_v1.toml``; texts enter it as JSON strings, so none can end its own quotes.
The reply is constrained to the numbers of the texts if the client supports it. If a reply cannot be parsed, the request is
retried once; if that fails too, the group has a reason instead of a pick. Shows no marks; does not know the odd text.
"""

from __future__ import annotations

import asyncio
import re
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from evalkit.errors import ContextOverflow, RequestRefused
from evalkit.markup import quoted
from evalkit.protocols import Client
from evalkit.records import JudgeItem, Message, Pick
from scorers.judges.llm.parsing import Unparsable
from scorers.picking import why_no_pick

__all__ = ["PICK_VERSION", "parse_pick", "pick_groups", "pick_prompt"]

PICK_VERSION = "pick-1"  # in records: the version of the prompt file and of the parser
_ANSWER_TOKENS = 4
_REPLY = re.compile(r"[\s\"'`*(\[]*(?:[Tt]ext\s+)?([0-9]{1,4})[\s\"'`*)\].]*")


@cache
def _prompt() -> dict[str, Any]:
    return tomllib.loads(files("scorers.judges").joinpath("prompts/pick_v1.toml").read_text(encoding="utf-8"))


async def pick_groups(
    client: Client,
    groups: Sequence[Sequence[JudgeItem]],
    *,
    seed_of: Callable[[Sequence[Message]], int],
    thinking_tokens: int = 0,
) -> list[Pick]:
    """One pick per group, in their order. ``seed_of`` returns the seed of a request.

    Raises ClientError if the model cannot be reached or rejects every request.
    """

    async def ask(group: Sequence[JudgeItem]) -> Pick | RequestRefused:
        if (reason := why_no_pick(group)) is not None:
            return Pick(None, reason)
        try:
            return await _pick(client, group, seed_of, thinking_tokens)
        except RequestRefused as error:
            return error
        except ContextOverflow as error:
            return Pick(None, reason=str(error))

    outcomes = await asyncio.gather(*(ask(group) for group in groups))
    refusals = [outcome for outcome in outcomes if isinstance(outcome, RequestRefused)]
    if refusals and len(refusals) == len(outcomes):
        raise refusals[0]  # every request was rejected, so no single text is the cause
    return [outcome if isinstance(outcome, Pick) else Pick(None, reason=str(outcome)) for outcome in outcomes]


async def _pick(
    client: Client,
    group: Sequence[JudgeItem],
    seed_of: Callable[[Sequence[Message]], int],
    thinking_tokens: int,
) -> Pick:
    messages = pick_prompt(group)
    reason = ""
    for _ in range(2):
        response = await client.generate(
            messages,
            choices=[str(number) for number in range(1, len(group) + 1)],
            seed=seed_of(messages),
            max_tokens=thinking_tokens + _ANSWER_TOKENS,
        )
        try:
            return Pick(parse_pick(response.answer, len(group)))
        except Unparsable as error:
            reason = str(error)
            again = f"That could not be read. Reply with one number from 1 to {len(group)}, and nothing else."
            messages = [*messages, Message("assistant", response.text), Message("user", again)]
    return Pick(None, reason=reason)


def pick_prompt(group: Sequence[JudgeItem]) -> list[Message]:
    """The chat messages that ask about one group."""
    prompt = _prompt()
    messages = [Message("system", prompt["system"].strip())]
    for shot in prompt["shots"]:
        messages.append(Message("user", _question(shot["texts"])))
        messages.append(Message("assistant", str(shot["answer"])))
    return [*messages, Message("user", _question([item.text for item in group]))]


def _question(texts: Sequence[str]) -> str:
    numbered = [f"{number}. {quoted(text)}" for number, text in enumerate(texts, 1)]
    return "\n".join(["Texts:", *numbered, f"Reply with one number from 1 to {len(texts)}."])


def parse_pick(text: str, count: int) -> int:
    """The index, from 0, of the text that the reply names.

    Raises Unparsable if the reply is anything but one number from 1 to ``count``.
    """
    shown = repr(text if len(text) <= 80 else text[:77] + "…")
    found = _REPLY.fullmatch(text)
    if found is None:
        raise Unparsable(f"the reply is not one number: {shown}")
    number = int(found[1])
    if not 1 <= number <= count:
        raise Unparsable(f"the reply is not a number from 1 to {count}: {shown}")
    return number - 1
