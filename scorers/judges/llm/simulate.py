"""Queries a language model to simulate a feature: a level from 0 to 9 for every token of one window.

The prompt is the versioned file ``prompts/simulate_v1.toml``; explanation and tokens enter it as JSON, so no text can end
its own quotes. Everything before the window's tokens is the same for all windows of an explanation, so that prefix caches
can be used. Replies are constrained if the client supports it. If it returns log-probabilities, a token's prediction is
the expected level Σ p(k)·k over the candidate digits, else the digit in the reply. If a reply cannot be parsed, the request
is retried once; if that fails too, the window has a reason instead of a simulation. Does not know true activations.

Source of the expected level: Bills et al. 2023, "Language models can explain neurons in language models" (OpenAI).
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from evalkit.errors import ContextOverflow, RequestRefused
from evalkit.markup import quoted
from evalkit.protocols import Client
from evalkit.records import Message, Response, Simulation
from scorers.judges.llm.parsing import Unparsable, is_spoken_of, takes_back

__all__ = [
    "SIMULATE_VERSION",
    "expected_level",
    "locate",
    "parse_levels",
    "simulate_prompt",
    "simulate_schema",
    "simulate_windows",
]

LEVELS = range(10)  # single digits: each is one token in every tokenizer, so its probability is known
SIMULATE_VERSION = "simulate-1"  # in records: the version of the prompt file and of the parser
_LOGPROBS = 5  # candidates per token: all servers return at least 5, and more would enlarge the recorded calls
_TOKENS_PER_LEVEL, _TOKENS_AROUND = 4, 16
_LEVEL = re.compile(r"""(["']?)([0-9])(?:\.0)?\1""")


@cache
def _prompt() -> dict[str, Any]:
    return tomllib.loads(files("scorers.judges").joinpath("prompts/simulate_v1.toml").read_text(encoding="utf-8"))


async def simulate_windows(
    client: Client,
    explanation: str,
    windows: Sequence[Sequence[str]],
    *,
    seed_of: Callable[[Sequence[Message]], int],
    thinking_tokens: int = 0,
) -> list[Simulation]:
    """One simulation per window, in their order; a window is given as the texts of its tokens.

    ``seed_of``: returns the seed of a request.
    ``thinking_tokens``: as in ``LlmJudge``; log-probabilities are then not used.

    Raises RequestRefused if every request is rejected, and other ClientErrors.
    """
    outcomes = await asyncio.gather(*(_ask(client, explanation, one, seed_of, thinking_tokens) for one in windows))
    refusals = [outcome for outcome in outcomes if isinstance(outcome, RequestRefused)]
    if refusals and len(refusals) == len(outcomes):
        raise refusals[0]  # every request was rejected, so no single text is the cause
    return [Simulation(None, str(one)) if isinstance(one, RequestRefused) else one for one in outcomes]


async def _ask(
    client: Client,
    explanation: str,
    tokens: Sequence[str],
    seed_of: Callable[[Sequence[Message]], int],
    thinking_tokens: int,
) -> Simulation | RequestRefused:
    messages, reason = simulate_prompt(explanation, tokens), ""
    try:
        for _ in range(2):
            response = await client.generate(
                messages,
                schema=simulate_schema(len(tokens)),
                logprobs=0 if thinking_tokens else _LOGPROBS,
                seed=seed_of(messages),
                max_tokens=_TOKENS_PER_LEVEL * len(tokens) + _TOKENS_AROUND + thinking_tokens,
            )
            try:
                if response.in_thought:
                    raise Unparsable(f"the reply ends during the model's reasoning: {response.answer[:77]!r}")
                return Simulation(_values(response, parse_levels(response.answer, len(tokens))))
            except Unparsable as error:
                reason = str(error)
                messages = _again(messages, response, len(tokens))
    except RequestRefused as error:
        return error
    except ContextOverflow as error:
        reason = str(error)
    return Simulation(None, reason)


def simulate_schema(count: int) -> dict[str, Any]:
    """The JSON schema of a list of ``count`` levels."""
    return {"type": "array", "items": {"enum": list(LEVELS)}, "minItems": count, "maxItems": count}


def simulate_prompt(explanation: str, tokens: Sequence[str]) -> list[Message]:
    """The chat messages that request the levels of one window's tokens."""
    prompt = _prompt()
    messages = [Message("system", prompt["system"].strip())]
    for shot in prompt["shots"]:
        messages.append(Message("user", _question(shot["description"], shot["tokens"])))
        messages.append(Message("assistant", json.dumps(shot["levels"])))
    return [*messages, Message("user", _question(explanation, tokens))]


def _question(description: str, tokens: Sequence[str]) -> str:
    lines = [f"Description: {quoted(description)}", f"Tokens: {quoted(tokens)}"]
    levels = "1 level" if len(tokens) == 1 else f"{len(tokens)} levels"
    return "\n".join([*lines, f"Reply with a list of {levels}."])


def _again(messages: Sequence[Message], response: Response, count: int) -> list[Message]:
    wanted = f"a JSON list of exactly {count} numbers, each a digit from 0 to 9"
    return [
        *messages,
        Message("assistant", response.text),
        Message("user", f"That could not be read. Reply with {wanted}, and nothing else."),
    ]


def parse_levels(text: str, count: int) -> tuple[int, ...]:
    """The levels of a reply with exactly one list of ``count`` levels, with or without prose. Raises Unparsable."""
    shown = repr(text if len(text) <= 80 else text[:77] + "…")
    if text.count("[") != 1 or text.count("]") != 1 or text.index("[") > text.index("]"):
        raise Unparsable(f"the reply does not contain exactly one list: {shown}")
    if is_spoken_of(text, text.index("["), text.index("]") + 1) or takes_back(text, text.index("]")):
        raise Unparsable(f"the reply discusses a list instead of giving one: {shown}")
    inside = text[text.index("[") + 1 : text.index("]")].strip()
    elements = [element.strip(" \t\r\n") for element in inside.split(",")] if inside else []
    found = [_LEVEL.fullmatch(element) for element in elements]
    for element, level in zip(elements, found, strict=True):
        if level is None:
            raise Unparsable(f"{element[:20]!r} is not a digit from 0 to 9: {shown}")
    if len(found) != count:
        raise Unparsable(f"{len(found)} levels instead of {count}: {shown}")
    return tuple(int(level[2]) for level in found if level is not None)


def _values(response: Response, levels: Sequence[int]) -> tuple[float, ...]:
    """The expected levels if the reply has log-probabilities of the digits, else the levels themselves."""
    steps = locate(response.logprobs, levels)
    if steps is None:
        return tuple(float(level) for level in levels)
    expected = [expected_level(response.logprobs[step]) for step in steps]
    return tuple(float(level) if value is None else value for value, level in zip(expected, levels, strict=True))


def locate(logprobs: Sequence[Mapping[str, float]], levels: Sequence[int]) -> list[int] | None:
    """The index of the generated token of each level; None if this is ambiguous or a level is not a token of its own.

    A client returns the candidates of every token, but not which candidate was sampled. The list is therefore searched for
    as a sequence of candidates. It may start at any token, and white space may occur anywhere.
    """
    target = "[" + ",".join(map(str, levels)) + "]"
    paths: dict[int, tuple[int, tuple[int | None, ...]]] = {}  # by length spelled: ways, token indices
    complete: list[tuple[int, tuple[int | None, ...]]] = []
    for step, candidates in enumerate(logprobs):
        longer: dict[int, tuple[int, tuple[int | None, ...]]] = {}
        for start, (ways, steps) in [(0, (1, ())), *paths.items()]:
            for piece in {_bare(candidate) for candidate, logprob in candidates.items() if logprob > -math.inf}:
                end = _spell(target, start, piece)
                if end is None:
                    continue
                spelled = target[start:end]
                own = (step,) if spelled.isdigit() else (None,) if any(map(str.isdigit, spelled)) else ()
                if end == len(target):
                    complete.append((ways, (*steps, *own)))
                else:
                    longer[end] = (longer[end][0] + ways, longer[end][1]) if end in longer else (ways, (*steps, *own))
        paths = longer
    if sum(ways for ways, _ in complete) != 1 or None in complete[0][1]:
        return None
    return [step for step in complete[0][1] if step is not None]


def _spell(target: str, start: int, piece: str) -> int | None:
    """The position in ``target`` after ``piece`` is spelled at ``start``, or None if it does not fit there."""
    if start == 0:
        opening = piece.rfind("[")
        if opening < 0:
            return None
        piece = piece[opening:]
    rest = target[start:]
    if rest.startswith(piece):
        return start + len(piece)
    return len(target) if piece.startswith(rest) else None


def expected_level(candidates: Mapping[str, float]) -> float | None:
    """Σ p(k)·k over the candidates that are digits; None if there are none.

    The candidates have natural-log probabilities. Probabilities are scaled to sum to one over the digits; a digit with
    surrounding white space counts as that digit.
    """
    mass = dict.fromkeys(LEVELS, 0.0)
    for candidate, logprob in candidates.items():
        bare = _bare(candidate)
        if len(bare) == 1 and bare in "0123456789" and not math.isnan(logprob):
            mass[int(bare)] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    return sum(level * share for level, share in mass.items()) / total if total > 0 else None


def _bare(token: str) -> str:
    """A token's text without white space, in whatever form the tokenizer writes white space."""
    return "".join(token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", " ").split())
