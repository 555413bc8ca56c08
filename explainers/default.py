"""The explainer that asks a language model: shows it marked windows with integer activations, reads one phrase back.

The prompt is the versioned file ``prompts/default_v1.toml``. Corpus text enters it as JSON strings, so no text can end
its own quotes or pose as an instruction. Prompt and parser are pure functions; the client is the caller's. A reply that
cannot be read is asked for once more and then fails: it is never used as an explanation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from evalkit.errors import BadConfig, ClientError, ContextOverflow
from evalkit.markup import MARK_SHARE, levels, marked_tokens, render, spans
from evalkit.protocols import Client
from evalkit.records import Example, ExplainExamples, Explanation, FeatureId, Message, Response

__all__ = ["DefaultExplainer", "explain_prompt", "parse_explanation", "spread"]

SCHEMA = {
    "type": "object",
    "properties": {"explanation": {"type": "string", "minLength": 1, "maxLength": 400}},
    "required": ["explanation"],
    "additionalProperties": False,
}
_LONGEST = 600  # characters; longer is a model that ran on, not a phrase


@cache
def _prompt() -> dict[str, Any]:
    return tomllib.loads(files("explainers").joinpath("prompts/default_v1.toml").read_text(encoding="utf-8"))


class DefaultExplainer:
    """Asks the client for one phrase.

    ``n_examples`` and ``n_negatives``: at most so many windows are shown, spread evenly over those there are. Where they
    do not fit the model's context, the weakest are left out and the explanation's note says so.
    ``share`` places the marks, see ``evalkit.markup.marked_tokens``. ``thinking_tokens``: room for models that think before
    they answer. ``seed`` goes to the client, mixed with the feature.
    """

    name = "default"
    uses_client = True
    version = "1"

    def __init__(
        self,
        n_examples: int = 40,
        n_negatives: int = 0,
        share: float = MARK_SHARE,
        max_tokens: int = 200,
        thinking_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        self.n_examples, self.n_negatives, self.share = n_examples, n_negatives, share
        self.max_tokens, self.seed = max_tokens + thinking_tokens, seed

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None) -> Explanation:
        """Describe the feature. Raises BadConfig without a client, ClientError where no reply can be read."""
        if client is None:
            raise BadConfig(
                "explainer 'default'",
                expected="a client that reaches a language model",
                seen="none",
                fix="name one (--client vllm:MODEL or openai:MODEL), or use the explainer 'words', which needs none",
            )
        seed = _seed(self.seed, examples.source, feature)
        shown, silent = spread(examples.positives, self.n_examples), spread(examples.negatives, self.n_negatives)
        asked = len(shown)
        while True:
            messages = explain_prompt(examples, shown, silent, self.share)
            try:
                text, response = await self._ask_twice(client, messages, seed)
                break
            except ContextOverflow as error:
                shown = _weakest_dropped(shown, error)
                if not shown:
                    raise
        if text is None:
            raise ClientError(
                f"explanation of {examples.source} feature {feature}",
                expected='a JSON object {"explanation": "…"} with one phrase',
                seen=f"{response.text[:80]!r} ({response.finish_reason})",
                fix="use a model that follows instructions, or a client that constrains replies to a schema",
            )
        note = (
            ""
            if len(shown) == asked
            else f"the context held {len(shown)} of {asked} examples: the weakest were left out"
        )
        return Explanation(examples.source, feature, self.name, self.version, text, note)

    async def _ask_twice(self, client: Client, messages: Sequence[Message], seed: int) -> tuple[str | None, Response]:
        """The phrase, asked for once more if the reply cannot be read, and the reply it was last looked for in."""
        response = await self._ask(client, messages, seed)
        text = parse_explanation(response)
        if text is None:
            retry = [*messages, Message("assistant", response.text), Message("user", _prompt()["retry"])]
            with contextlib.suppress(ContextOverflow):  # a long reply that cannot be read: no room to ask again
                response = await self._ask(client, retry, seed)
                text = parse_explanation(response)
        return text, response

    async def _ask(self, client: Client, messages: Sequence[Message], seed: int) -> Response:
        return await client.generate(messages, schema=SCHEMA, seed=seed, max_tokens=self.max_tokens)


def explain_prompt(
    examples: ExplainExamples,
    shown: Sequence[Example],
    silent: Sequence[Example] = (),
    share: float = MARK_SHARE,
) -> list[Message]:
    """The chat messages that ask for an explanation. ``shown``: active windows; ``silent``: windows without activity."""
    prompt = _prompt()
    lines = ["Active:"]
    for number, example in enumerate(shown, 1):
        marks = spans(example.tokens, marked_tokens(example.activations, examples.threshold, share))
        lines.append(f"{number}. {_quote(render(example.text, marks))}")
        lines.append(f"   levels: {_levels(example, examples)}")
    if silent:
        lines.append("Not active:")
        lines += [f"{number}. {_quote(render(one.text, ()))}" for number, one in enumerate(silent, len(shown) + 1)]
    messages = [Message("system", prompt["system"].strip())]
    for shot in prompt["shots"]:
        messages.append(Message("user", f"{shot['user'].strip()}\n\n{prompt['question']}"))
        messages.append(Message("assistant", shot["assistant"].strip()))
    return [*messages, Message("user", "\n".join([*lines, "", prompt["question"]]))]


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """At most ``count`` of them, evenly spaced, order kept."""
    if len(examples) <= count:
        return list(examples)
    return [examples[index * len(examples) // count] for index in range(count)]


def _weakest_dropped(shown: Sequence[Example], overflow: ContextOverflow) -> list[Example]:
    """Fewer examples, the order kept: by as much as the overflow says, and by an eighth at least."""
    share = 0.75
    if overflow.limit is not None and overflow.needed is not None:
        share = min(overflow.limit / overflow.needed, 0.875)
    keep = min(int(len(shown) * share), len(shown) - 1)
    strongest = sorted(range(len(shown)), key=lambda index: (-shown[index].peak, index))[:keep]
    return [shown[index] for index in sorted(strongest)]


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _levels(example: Example, examples: ExplainExamples) -> str:
    """The active tokens with their levels, "whale 9, sea 3"; tokens that need quotes get them."""
    pairs = zip(example.tokens, levels(example.activations, examples.threshold, examples.peak), strict=True)
    return ", ".join(f"{_plain(token)} {level}" for token, level in pairs if level)


def _plain(token: str) -> str:
    bare = token.strip()
    return bare if re.fullmatch(r"[\w'’-]+", bare) else _quote(token)


def parse_explanation(response: Response) -> str | None:
    """The phrase of a reply, or None: the one JSON object in it with the one key "explanation" and a non-empty text."""
    found = []
    decoder = json.JSONDecoder()
    reply = response.answer
    place = reply.find("{")
    while place != -1:
        try:
            value, end = decoder.raw_decode(reply, place)
        except (json.JSONDecodeError, RecursionError):
            end = place + 1
        else:
            found.append(value)
        place = reply.find("{", end)
    if len(found) != 1 or set(found[0]) != {"explanation"} or not isinstance(found[0]["explanation"], str):
        return None
    text = " ".join(found[0]["explanation"].split())
    return text if 0 < len(text) <= _LONGEST and re.search(r"\w", text) else None


def _seed(seed: int, *names: str) -> int:
    digest = hashlib.blake2b("\x1f".join([str(seed), *names]).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
