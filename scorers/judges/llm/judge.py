"""The judge that queries a language model: for one list of 0 and 1 about several texts, or for yes or no about one text.

The answer about one text comes with P(yes). Prompts are the versioned files ``prompts/list_v*.toml`` and
``prompts/single_v*.toml``. The explanation and the texts enter them as JSON strings, so no text can end its own quotes.
The part that all requests share comes first and the texts come last, so that prefix caches can be used. Replies are
constrained if the client supports it. If a reply cannot be parsed, the request is retried once; if that fails too, its
items are unscored, with the reason. A list that does not fit the context is split in two. Does not know labels; the caller
provides the client.
"""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeAlias

from evalkit.errors import BadConfig, ContextOverflow, RequestRefused
from evalkit.markup import quoted, render
from evalkit.protocols import Client
from evalkit.records import Answer, JudgeItem, Message, Pick, Response, Simulation
from evalkit.seeds import derive_request_seed
from scorers.judges.llm.parsing import Unparsable, gives_yes_or_no, parse_list, parse_yes_no, probability_of_yes
from scorers.judges.llm.pick import PICK_VERSION, pick_groups
from scorers.judges.llm.simulate import SIMULATE_VERSION, simulate_windows

__all__ = ["LlmJudge", "list_prompt", "list_schema", "single_prompt"]

Mode: TypeAlias = Literal["list", "single"]
CHOICES = ("yes", "no")
_LOGPROBS = 10  # candidates of the first token: enough for "yes" and "no" in all their spellings
_TOKENS_PER_ANSWER, _TOKENS_AROUND = 4, 16
# versions in records; list prompt 1 was "list-1" before its parser accepted more forms of replies
_VERSIONS = {("list", 1): "list-1.2", ("list", 2): "list-2", ("single", 1): "single-1", ("single", 2): "single-2"}
# parts of the first prompts that are not in their files
_FIRST = {
    "list": {"closing": "Reply with a list of {answers}.", "comma": ", "},
    "single": {"closing": "Reply with yes or no."},
}


@cache
def _prompt(mode: Mode, version: int, marked: bool) -> dict[str, Any]:
    text = files("scorers.judges").joinpath(f"prompts/{mode}_v{version}.toml").read_text(encoding="utf-8")
    prompt: dict[str, Any] = tomllib.loads(text)
    return {**_FIRST[mode], **prompt, **prompt["marked" if marked else "plain"]}


class LlmJudge:
    """Queries ``client``.

    ``mode``: "list" (``batch_size`` texts per request) or "single" (one text, with P(yes) if the client returns
    log-probabilities).
    ``thinking_tokens``: additional tokens for models that reason before they answer; P(yes) is then not available.
    ``seed``: hashed with each request into the seed that is sent to the client.
    ``prompt_version``: 1 reproduces records made with the first prompts, which cost twice the tokens.

    Raises BadConfig.
    """

    name = "llm"
    main_option = "mode"
    uses_client = True
    probabilistic = True

    def __init__(
        self,
        client: Client | None,
        mode: Mode = "list",
        batch_size: int = 5,
        thinking_tokens: int = 0,
        seed: int = 0,
        prompt_version: int = 2,
    ) -> None:
        if client is None:
            raise BadConfig(
                "judge 'llm'",
                expected="a client that reaches a language model",
                seen="none",
                fix="name one: --client vllm:MODEL for a local model, --client openai:MODEL for a server",
            )
        if mode not in ("list", "single"):
            raise BadConfig("mode of judge 'llm'", expected="list or single", seen=repr(mode), fix="use one of these")
        if batch_size < 1:
            raise BadConfig("batch_size of judge 'llm'", expected="at least 1", seen=str(batch_size), fix="use 5")
        self.client, self.mode, self.batch_size, self.seed = client, mode, batch_size, seed
        if (mode, prompt_version) not in _VERSIONS:
            raise BadConfig("prompt_version of judge 'llm'", expected="1 or 2", seen=repr(prompt_version), fix="use 2")
        self.thinking_tokens, self.prompt_version = thinking_tokens, prompt_version
        self.version = f"{_VERSIONS[mode, prompt_version]}/{PICK_VERSION}/{SIMULATE_VERSION}"

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        """One answer per item, in their order. Raises ClientError if the model is unreachable or rejects every request."""
        size = self.batch_size if self.mode == "list" else 1
        batches = []
        for marked in (False, True):  # the two kinds of question have different prompts
            chosen = [index for index, item in enumerate(items) if (item.marks is not None) == marked]
            batches += [chosen[first : first + size] for first in range(0, len(chosen), size)]
        asked = (self._answer(explanation, [items[i] for i in batch]) for batch in batches)
        outcomes = await asyncio.gather(*asked)
        refusals = [outcome for outcome in outcomes if isinstance(outcome, RequestRefused)]
        if refusals and len(refusals) == len(outcomes):
            raise refusals[0]  # every request was rejected, so no single text is the cause
        answers = [Answer(None, reason="not asked")] * len(items)
        for batch, outcome in zip(batches, outcomes, strict=True):
            for index, answer in zip(batch, _settled(outcome, len(batch)), strict=True):
                answers[index] = answer
        return answers

    async def pick(self, groups: Sequence[Sequence[JudgeItem]]) -> Sequence[Pick]:
        """The odd text of each group; see ``scorers.judges.llm.pick``. Raises the same errors as ``judge``."""
        return await pick_groups(self.client, groups, seed_of=self._seed, thinking_tokens=self.thinking_tokens)

    async def simulate(self, explanation: str, windows: Sequence[Sequence[str]]) -> Sequence[Simulation]:
        """The predicted level of every token of each window; see ``scorers.judges.llm.simulate``. Raises as ``judge``."""
        return await simulate_windows(
            self.client, explanation, windows, seed_of=self._seed, thinking_tokens=self.thinking_tokens
        )

    async def _answer(self, explanation: str, batch: Sequence[JudgeItem]) -> list[Answer] | RequestRefused:
        """One answer per item, or the error if the server rejects the request."""
        ask = self._ask_list if self.mode == "list" else self._ask_single
        try:
            return await ask(explanation, batch)
        except RequestRefused as error:
            return error
        except ContextOverflow as error:
            if len(batch) == 1:
                return [Answer(None, reason=str(error))]
            half = len(batch) // 2
            halves = (batch[:half], batch[half:])
            outcomes = await asyncio.gather(*(self._answer(explanation, part) for part in halves))
            settled = (_settled(outcome, len(part)) for part, outcome in zip(halves, outcomes, strict=True))
            return [answer for part in settled for answer in part]

    async def _ask_list(self, explanation: str, batch: Sequence[JudgeItem]) -> list[Answer]:
        messages, count = list_prompt(explanation, batch, self.prompt_version), len(batch)
        reason = ""
        for _ in range(2):
            response = await self.client.generate(
                messages,
                schema=list_schema(count),
                seed=self._seed(messages),
                max_tokens=_TOKENS_PER_ANSWER * count + _TOKENS_AROUND + self.thinking_tokens,
            )
            try:
                return [Answer(match, confidence=float(match)) for match in parse_list(response.answer, count)]
            except Unparsable as error:
                reason = str(error)
                messages = self._again(messages, response, f"a JSON list of exactly {count} numbers, each 0 or 1")
        return [Answer(None, reason=reason)] * count

    async def _ask_single(self, explanation: str, batch: Sequence[JudgeItem]) -> list[Answer]:
        messages = single_prompt(explanation, batch[0], self.prompt_version)
        reason = ""
        for _ in range(2):
            response = await self.client.generate(
                messages,
                choices=CHOICES,
                logprobs=0 if self.thinking_tokens else _LOGPROBS,  # the first token would be a thought, not the answer
                seed=self._seed(messages),
                max_tokens=self.thinking_tokens + _TOKENS_PER_ANSWER if self.thinking_tokens else 1,
            )
            yes = probability_of_yes(response.logprobs[0]) if response.logprobs else None
            try:
                if yes is not None and gives_yes_or_no(response.logprobs[0], response.answer):
                    return [Answer(yes > 0.5, confidence=yes, probability=yes)]
                match = parse_yes_no(response.answer)
            except Unparsable as error:
                reason = str(error)
                messages = self._again(messages, response, "one word, yes or no")
            else:
                return [Answer(match, confidence=float(match))]
        return [Answer(None, reason=reason)]

    def _again(self, messages: Sequence[Message], response: Response, wanted: str) -> list[Message]:
        """The same question with the instruction repeated.

        Prompt 2 omits the unreadable reply, which may be long and does not help.
        """
        if self.prompt_version == 1:
            again = f"That could not be read. Reply with {wanted}, and nothing else."
            return [*messages, Message("assistant", response.text), Message("user", again)]
        return [*messages[:-1], Message("user", f"{messages[-1].content}\nReply with {wanted}, and nothing else.")]

    def _seed(self, messages: Sequence[Message]) -> int:
        """A 31-bit hash of the judge's seed and the request, so that different requests are sampled independently."""
        return derive_request_seed(self.seed, *(message.content for message in messages))


def _settled(outcome: list[Answer] | RequestRefused, count: int) -> list[Answer]:
    """The answers, or ``count`` unscored answers with the error as their reason."""
    return [Answer(None, reason=str(outcome))] * count if isinstance(outcome, RequestRefused) else outcome


def list_schema(count: int) -> dict[str, Any]:
    """The JSON schema of a list of ``count`` answers."""
    return {"type": "array", "items": {"enum": [0, 1]}, "minItems": count, "maxItems": count}


def list_prompt(explanation: str, items: Sequence[JudgeItem], version: int = 2) -> list[Message]:
    """The chat messages that request one list of answers. Either all items have marks, or none."""
    prompt = _prompt("list", version, bool(items) and items[0].marks is not None)
    messages = [Message("system", prompt["system"].strip())]
    for shot in prompt["shots"]:
        messages.append(Message("user", _list_question(shot["description"], shot["texts"], prompt["closing"])))
        messages.append(Message("assistant", f"[{prompt['comma'].join(map(str, shot['answers']))}]"))
    question = _list_question(explanation, [_shown(item) for item in items], prompt["closing"])
    return [*messages, Message("user", question)]


def single_prompt(explanation: str, item: JudgeItem, version: int = 2) -> list[Message]:
    """The chat messages that ask about one text."""
    prompt = _prompt("single", version, item.marks is not None)
    messages = [Message("system", prompt["system"].strip())]
    for shot in prompt["shots"]:
        messages.append(Message("user", _single_question(shot["description"], shot["text"], prompt["closing"])))
        messages.append(Message("assistant", shot["answer"]))
    return [*messages, Message("user", _single_question(explanation, _shown(item), prompt["closing"]))]


def _list_question(description: str, texts: Sequence[str], closing: str) -> str:
    numbered = [f"{number}. {quoted(text)}" for number, text in enumerate(texts, 1)]
    answers = "1 answer" if len(texts) == 1 else f"{len(texts)} answers"
    return "\n".join([f"Description: {quoted(description)}", "Texts:", *numbered, closing.format(answers=answers)])


def _single_question(description: str, text: str, closing: str) -> str:
    return f"Description: {quoted(description)}\nText: {quoted(text)}\n{closing}"


def _shown(item: JudgeItem) -> str:
    """The text as the model sees it. A marked text is escaped, so that a << of the corpus does not read as a mark."""
    return item.text if item.marks is None else render(item.text, item.marks)
