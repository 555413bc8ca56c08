"""Estimates the calls, tokens and cost of querying a language model, with the real explainers, scorers and judges.

They are run with a client that counts requests and returns well-formed dummy replies. The examples are the run's own if
they are collected, else windows made up from the package's bundled text. The number of calls is then exact, except for
features that turn out to be ineligible. Tokens are estimated from characters, with the ratio of earlier calls if there are
some. Makes no API calls; writes nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evalkit.abilities import uses_client
from evalkit.config.run_config import RunConfig
from evalkit.errors import EvalkitError
from evalkit.evaluate.score_stage import Test
from evalkit.llm.accounting.answer_store import KeyedRequest, Recording, Spent
from evalkit.llm.accounting.budget import TOKENS_PER_CHARACTER
from evalkit.llm.accounting.prices import Price
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.protocols import Explainer
from evalkit.records import (
    Example,
    ExplainExamples,
    Explanation,
    FeatureExamples,
    Message,
    Response,
    ScoreExamples,
    TestExamples,
)
from evalkit.seeds import derive

__all__ = [
    "CountingClient",
    "Estimate",
    "Load",
    "count_explaining",
    "count_scoring",
    "made_up",
    "tokens_per_character",
    "total",
]

_PHRASE = "words and phrases that have to do with the sea, with ships and with the people who work on them"
_MOST_FEATURES = 24  # prompts are built for at most this many features and scaled to all
_CALLS_TO_LEARN_FROM = 20  # with fewer earlier calls, default ratios and times are used
ASSUMED_CALL_S = 2.0  # time of a call, from sending to the last byte, without earlier calls to measure
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Load:
    """The requests of one part of a run.

    ``recorded``: how many of the ``calls`` are answered in a recording already; they cost nothing.
    ``prompt_characters``, ``prompt_tokens``, ``completion_tokens``: totals over the other calls.
    """

    calls: float = 0
    recorded: float = 0
    prompt_characters: float = 0
    prompt_tokens: float = 0
    completion_tokens: float = 0

    def __add__(self, other: Load) -> Load:
        return Load(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, factor: float) -> Load:
        return Load(*(value * factor for value in _values(self)))


def _values(load: Load) -> tuple[float, ...]:
    return (load.calls, load.recorded, load.prompt_characters, load.prompt_tokens, load.completion_tokens)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The requests that a run will still send, with their time and cost.

    ``parts``: requests by explainer or test.
    ``cost``: US dollars; None without a price.
    ``seconds``: expected time, computed from ``seconds_per_call``; meaningless for a batch client.
    ``basis``: the examples that the requests were counted on.
    ``batch_window``: the time within which a batch is completed, such as "24h"; None unless the client sends batches.
    """

    model: str
    parts: Mapping[str, Load]
    cost: float | None
    seconds: float
    seconds_per_call: float
    basis: str
    batch_window: str | None = None

    @property
    def load(self) -> Load:
        return sum(self.parts.values(), Load())

    @property
    def waves(self) -> int:
        """Number of rounds of batches that must follow each other: explanations first, then judgements (0 to 2)."""
        return len({name.startswith("explain ") for name, part in self.parts.items() if part.calls > part.recorded})

    def as_json(self) -> dict[str, Any]:
        """The estimate as JSON values, rounded to its precision."""
        load = self.load
        return {
            "model": self.model,
            "calls": round(load.calls),
            "recorded_calls": round(load.recorded),
            "prompt_tokens": round(load.prompt_tokens),
            "completion_tokens": round(load.completion_tokens),
            "cost_usd": None if self.cost is None else round(self.cost, 4),
            "seconds": None if self.batch_window else round(self.seconds),
            "seconds_per_call": None if self.batch_window else round(self.seconds_per_call, 2),
            "batches": {"waves": self.waves, "window": self.batch_window} if self.batch_window else None,
            "basis": self.basis,
            "parts": {
                name: {"calls": round(part.calls), "prompt_tokens": round(part.prompt_tokens)}
                for name, part in self.parts.items()
            },
        }


class CountingClient:
    """Answers every request with a well-formed dummy reply or the recorded one, and counts requests in ``load``."""

    def __init__(
        self, name: str, recordings: Sequence[Recording] = (), tokens_per_character: float | None = None
    ) -> None:
        self.name = name
        self._recordings = recordings
        self._ratio = tokens_per_character or TOKENS_PER_CHARACTER
        self._seen: set[str] = set()
        self.load = Load()

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        request = KeyedRequest.of(self.name, GenerateRequest(messages, **options))
        text = _reply(options.get("schema"), options.get("choices"), f"{_PHRASE}, {request.key[:6]}")
        if request.key in self._seen:  # equal requests are sent only once
            return Response(text)
        self._seen.add(request.key)
        for recording in self._recordings:
            if (found := recording.find(request.key)) is not None:
                self.load += Load(calls=1, recorded=1)
                return found.response
        characters = len(request.text)
        tokens = min(max(len(text) * 0.4, 1), options["max_tokens"])
        self.load += Load(1, 0, characters, characters * self._ratio, tokens)
        return Response(text)


def _reply(schema: Mapping[str, Any] | None, choices: Sequence[str] | None, phrase: str) -> str:
    """A reply that satisfies the constraint, with ``phrase`` wherever it contains text."""
    if choices:
        return choices[0]
    return phrase if schema is None else json.dumps(_instance(schema, phrase))


def _instance(schema: Mapping[str, Any], phrase: str) -> Any:
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {name: _instance(inside, phrase) for name, inside in schema.get("properties", {}).items()}
    if kind == "array":
        return [_instance(schema.get("items", {}), phrase)] * int(schema.get("minItems", 1))
    return {"integer": 0, "number": 0.0, "boolean": False}.get(str(kind), phrase)


async def count_explaining(
    explainers: Mapping[str, Explainer], examples: Sequence[FeatureExamples], client: CountingClient
) -> dict[str, Load]:
    """The requests for explaining these features, by recorded name, of the explainers that query a model."""
    loads = {}
    for name, explainer in explainers.items():
        before = client.load
        if uses_client(explainer):
            for one in _some(examples):
                with contextlib.suppress(EvalkitError):  # it cannot explain this feature, so it sends nothing
                    await explainer.explain(one.explain.feature, one.explain, client)
            loads[f"explain {name}"] = (client.load + before * -1) * _scale(examples)
    return loads


async def count_scoring(
    tests: Sequence[Test],
    examples: Sequence[FeatureExamples],
    client: CountingClient,
    explained: Mapping[tuple[str, str], Sequence[Explanation]] | None = None,
    n_explanations: int = 1,
) -> dict[str, Load]:
    """The requests of these tests, by recorded name. The judges must have been created with ``client``.

    ``explained``: existing explanations to be judged, by source and feature.
    ``n_explanations``: explanations per feature; missing ones are replaced by dummies of typical length.
    """
    loads: dict[str, Load] = {}
    for test in tests:
        if not uses_client(test.judge):
            continue
        before = client.load
        for one in _some(examples):
            key = (one.score.source, one.score.feature)
            there = list((explained or {}).get(key, ()))
            missing = range(n_explanations - len(there))
            stand_ins = [Explanation(*key, "", "", _stand_in(*key, index)) for index in missing]
            asked = [*there, *stand_ins] if test.needs_explanation else [Explanation(*key, "", "", "")]
            for explanation in asked:
                await test.scorer.score(explanation, replace(one.score, repeat=test.repeat), test.judge)
        name = f"{test.scorer_name} {test.judge_name}"
        loads[name] = loads.get(name, Load()) + (client.load + before * -1) * _scale(examples)
    return loads


def _stand_in(source: str, feature: str, index: int) -> str:
    """An explanation of typical length, different for every feature: equal requests would count only once."""
    return f"{_PHRASE}, {derive(index, source, feature) % 10**6:06d}"


def _some(examples: Sequence[FeatureExamples]) -> Sequence[FeatureExamples]:
    return examples[:: max(1, -(-len(examples) // _MOST_FEATURES))]


def _scale(examples: Sequence[FeatureExamples]) -> float:
    return len(examples) / len(_some(examples)) if examples else 0.0


def total(
    parts: Mapping[str, Load],
    model: str,
    price: Price | None,
    spent: Spent,
    in_flight: int,
    basis: str,
    batch_window: str | None = None,
) -> Estimate:
    """The estimate of all parts.

    ``spent``: earlier calls of the model, from which the time per call is computed.
    ``in_flight``: the client's concurrency limit.
    """
    load = sum(parts.values(), Load())
    to_make = load.calls - load.recorded
    cost = None if price is None else price.cost(load.prompt_tokens, load.completion_tokens)
    learned = spent.timed_calls >= _CALLS_TO_LEARN_FROM
    per_call = spent.seconds / spent.timed_calls if learned else ASSUMED_CALL_S
    return Estimate(model, parts, cost, to_make * per_call / in_flight, per_call, basis, batch_window)


def tokens_per_character(spent: Spent) -> float | None:
    """Tokens per character of earlier prompts; None if there are too few calls."""
    return spent.prompt_tokens / spent.prompt_characters if spent.calls >= _CALLS_TO_LEARN_FROM else None


def made_up(config: RunConfig) -> FeatureExamples:
    """One feature with as many windows as in a run, cut from the package's bundled text."""
    texts = _windows(config.window_length)
    counter = itertools.count()

    def windows(count: int, *, active: bool) -> tuple[Example, ...]:
        return tuple(_window(next(counter), next(texts), active=active) for _ in range(count))

    shown = windows(config.n_explain, active=True)
    silent, promoted = windows(config.n_explain, active=False), tuple(f" token{n}" for n in range(20))
    explain = ExplainExamples("estimate", "0", 0.0, 9.0, shown, silent, promoted)
    test = TestExamples(
        windows(config.n_positives, active=True),
        windows(config.n_positives, active=True),
        windows(config.n_negatives, active=False),
    )
    score = ScoreExamples("estimate", "0", 0.0, config.seed, test, replace(test))
    return FeatureExamples(explain, score)


def _windows(length: int) -> Iterator[tuple[str, ...]]:
    """Endless windows of ``length`` pieces with four characters each, an average token; restarts at the end of the text."""
    from evalkit.corpus.readers import locate, read_pieces

    while True:
        pieces = read_pieces(locate("bundled:demo"), text_field="text", split="train", revision=None)
        for piece in pieces:
            text = str(piece[0])
            step = length * _CHARACTERS_PER_TOKEN
            for start in range(0, len(text) - step, step):
                chunk = text[start : start + step]
                yield tuple(chunk[i : i + _CHARACTERS_PER_TOKEN] for i in range(0, step, _CHARACTERS_PER_TOKEN))


def _window(index: int, tokens: tuple[str, ...], *, active: bool) -> Example:
    strengths = [0.0] * len(tokens)
    if active:
        strengths[len(tokens) // 3], strengths[len(tokens) // 2] = 9.0, 4.0
    return Example(index, index, tokens, tuple(strengths), decile=index % 10 if active else None)
