"""Explainer, judge and scorers of eai-delphi (extra ``delphi``) as parts of a run: its prompts, its parsing, its marks.

``delphi-default`` explains as its default explainer does. ``delphi-detection`` and ``delphi-fuzz`` are its scorers on our
windows: they choose what is marked, shuffle, ask and read replies themselves, and every text that they show becomes a
judgement; what they do not read is unscored, with the reply as the reason. They ask through the judge ``delphi``, which by
itself asks our scorers' questions with its prompts. What is wrong with them is kept (``tests/delphi/test_parity.py`` lists
it); only what would touch other features is not: every feature has a scorer of its own, so order changes nothing.

Imports the library when a part is made. Knows no files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from evalkit.delphi.library import MAX_TOKENS, Asking, library, library_version, record_of
from evalkit.errors import BadConfig, ClientError, ContextOverflow, EvalkitError, RequestRefused
from evalkit.protocols import Client, Judge
from evalkit.records import (
    Answer,
    Example,
    ExplainExamples,
    Explanation,
    FeatureId,
    JudgeItem,
    Judgement,
    Score,
    ScoreExamples,
)

__all__ = ["DelphiDetectionScorer", "DelphiExplainer", "DelphiFuzzScorer", "DelphiJudge"]

_UNREAD = "Explanation could not be parsed."  # what its explainer says instead of failing
_SEED = 42  # of its shuffles


def _client_of(client: Client | None, part: str) -> Client:
    if client is None:
        raise BadConfig(
            part,
            expected="a client that reaches a language model",
            seen="none",
            fix="name one: --client vllm:MODEL for a local model, --client openai:MODEL for a server",
        )
    return client


class DelphiExplainer:
    """Its default explainer, shown all windows of the explain pool.

    ``activations``, ``cot`` and ``threshold`` are its own options. ``seed`` goes to the client, mixed with the request.
    Raises MissingExtra.
    """

    name = "delphi-default"
    uses_client = True

    def __init__(
        self,
        activations: bool = True,
        cot: bool = False,
        threshold: float = 0.3,
        max_tokens: int = MAX_TOKENS,
        seed: int = 0,
    ) -> None:
        self._make = library("explainers").DefaultExplainer
        self._options = {"activations": activations, "cot": cot, "threshold": threshold}
        self._max_tokens, self._seed = max_tokens, seed
        self.version = library_version()

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None) -> Explanation:
        """Describe the feature. Raises BadConfig without a client, ClientError for a reply without an explanation."""
        asking = Asking(_client_of(client, "explainer 'delphi-default'"), self._seed, self._max_tokens)
        record = record_of(feature, peak=examples.peak, train=examples.positives)
        found: str = (await self._make(asking, **self._options)(record)).explanation
        if found == _UNREAD or not found.strip():
            raise ClientError(
                f"explanation of {examples.source} feature {feature}",
                expected="a reply with [EXPLANATION]: and a phrase",
                seen=repr(str(asking.outcomes[-1])[:80]),
                fix="use a model that follows instructions",
            )
        return Explanation(examples.source, feature, self.name, self.version, found.strip())


class DelphiJudge:
    """Asks with its prompts, ``batch_size`` texts each, and reads replies as it does.

    ``log_prob``: also P(match), from the log-probabilities of the reply's tokens. A last, shorter batch is asked for as
    many answers as it has texts, which its own scorers get wrong. Marks are written as they are, nothing is escaped.
    Raises BadConfig, MissingExtra.
    """

    name = "delphi"
    uses_client = True
    probabilistic = True

    def __init__(
        self,
        client: Client | None,
        batch_size: int = 5,
        log_prob: bool = False,
        max_tokens: int = MAX_TOKENS,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise BadConfig("batch_size of judge 'delphi'", expected="at least 1", seen=str(batch_size), fix="use 5")
        self.client = _client_of(client, "judge 'delphi'")
        self.batch_size, self.log_prob, self.seed = batch_size, log_prob, seed
        self._max_tokens = max_tokens
        self._scorers = library("scorers")
        self.version = library_version()

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        """As many answers as items, in their order. Raises what the client raises but for refusals and overflows."""
        answers = [Answer(None, reason="not asked")] * len(items)
        outcomes: list[str | EvalkitError] = []

        async def ask(batch: Sequence[int], make: Any) -> None:
            scorer, asking = self.scorer(make, len(batch))
            shown = [_sample(items[index]) for index in batch]
            outputs = await scorer._generate(explanation, shown)
            outcomes.extend(asking.outcomes)
            for index, output in zip(batch, outputs, strict=True):
                match, confidence, probability, reason = _read(output, asking.outcomes[0], len(batch), len(batch))
                answers[index] = Answer(match, confidence, probability, reason)

        calls = []
        for marked, make in ((False, self._scorers.DetectionScorer), (True, self._scorers.FuzzingScorer)):
            chosen = [index for index, item in enumerate(items) if (item.marks is not None) == marked]
            step = self.batch_size
            calls += [ask(chosen[first : first + step], make) for first in range(0, len(chosen), step)]
        await asyncio.gather(*calls)
        _check_answered(outcomes)
        return answers

    def scorer(self, make: Any, n_shown: int, repeat: int = 0, **options: Any) -> tuple[Any, Asking]:
        """One of its scorers that asks our client, and what keeps the replies."""
        asking = Asking(self.client, self.seed, self._max_tokens)
        return make(asking, n_examples_shown=n_shown, log_prob=self.log_prob, seed=_SEED + repeat, **options), asking


class _DelphiScorer:
    """What its two scorers share here. ``batch_size`` texts a prompt; ``log_prob``, ``max_tokens`` as the judge has."""

    name: str
    _class: str
    own_judge = "delphi"  # an instance adds its options

    def __init__(
        self, batch_size: int = 5, log_prob: bool = False, max_tokens: int = MAX_TOKENS, **options: Any
    ) -> None:
        self._make = getattr(library("scorers"), self._class)
        self._options = options
        given = [f"batch_size={batch_size}"] if batch_size != 5 else []
        given += ["log_prob=true"] if log_prob else []
        given += [f"max_tokens={max_tokens}"] if max_tokens != MAX_TOKENS else []
        self.own_judge = ":".join(["delphi", *([",".join(given)] if given else [])])
        self.version = library_version()

    async def score(self, explanation: Explanation, examples: ScoreExamples, judge: Judge) -> Score:
        """A judgement for every text that it shows. Raises BadConfig for another judge than its own, ClientError."""
        if not isinstance(judge, DelphiJudge):
            raise BadConfig(
                f"scorer {self.name!r}", expected="its own judge", seen=judge.name, fix="leave it to choose its judge"
            )
        test = examples.test
        scorer, asking = judge.scorer(self._make, judge.batch_size, examples.repeat, **self._options)
        peak = max((example.peak for example in test.positives), default=0.0)
        record = record_of(
            examples.feature, peak=peak, test=test.positives, silent=test.negatives, explanation=explanation.text
        )
        owners = {id(one.str_tokens): example for one, example in zip(record.test, test.positives, strict=True)}
        owners |= {id(one.str_tokens): example for one, example in zip(record.not_active, test.negatives, strict=True)}
        outputs = (await scorer(record)).score
        _check_answered(asking.outcomes)
        judgements = []
        for index, output in enumerate(outputs):
            batch = index // judge.batch_size
            size = min(judge.batch_size, len(outputs) - batch * judge.batch_size)
            found = _read(output, asking.outcomes[batch], size, judge.batch_size)
            judgements.append(_judgement(index, owners[id(output.str_tokens)], bool(output.activating), *found))
        return Score(examples.source, examples.feature, self.name, self.version, tuple(judgements))


class DelphiDetectionScorer(_DelphiScorer):
    """Its detection: windows where the feature fires, and windows where it does not, without marks."""

    name = "delphi-detection"
    _class = "DetectionScorer"

    def __init__(self, batch_size: int = 5, log_prob: bool = False, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__(batch_size, log_prob, max_tokens)


class DelphiFuzzScorer(_DelphiScorer):
    """Its fuzzing: true marks on windows where the feature fires; false ones on windows where it does not.

    ``fuzz_type`` "active" puts the false ones on the same windows as the true ones.
    """

    name = "delphi-fuzz"
    _class = "FuzzingScorer"

    def __init__(
        self, fuzz_type: str = "default", batch_size: int = 5, log_prob: bool = False, max_tokens: int = MAX_TOKENS
    ) -> None:
        if fuzz_type not in ("default", "active"):
            raise BadConfig("fuzz_type", expected="default or active", seen=repr(fuzz_type), fix="use one of these")
        super().__init__(batch_size, log_prob, max_tokens, fuzz_type=fuzz_type)


def _check_answered(outcomes: Sequence[str | EvalkitError]) -> None:
    """Raises what is not about single texts: any other error, and the refusal of whatever was asked."""
    errors = [one for one in outcomes if isinstance(one, EvalkitError)]
    for error in errors:
        if not isinstance(error, RequestRefused | ContextOverflow):
            raise error
    if errors and len(errors) == len(outcomes) and all(isinstance(error, RequestRefused) for error in errors):
        raise errors[0]


def _sample(item: JudgeItem) -> Any:
    """A text with its marks, as its scorers hold one; the label is not known here and never shown."""
    kinds = library("scorers.classifier.sample")
    text, position = "", 0
    for start, end in item.marks or ():
        text += f"{item.text[position:start]}<<{item.text[start:end]}>>"
        position = end
    output = kinds.ClassifierOutput(str_tokens=[item.text], activations=[0.0], distance=0, activating=False)
    return kinds.Sample(text + item.text[position:], output)


def _read(
    output: Any, outcome: str | EvalkitError, size: int, n_shown: int
) -> tuple[bool | None, float | None, float | None, str | None]:
    """Match, confidence, probability, and why there is none."""
    if output.prediction is None:
        if isinstance(outcome, EvalkitError):
            return None, None, None, str(outcome)
        where = "" if size == n_shown else f", of a last batch with {size} texts"
        return None, None, None, f"eai-delphi read no list of {n_shown} answers{where}: {outcome[:80]!r}"
    match = bool(output.prediction)
    probability = None if output.probability is None else float(output.probability)
    return match, float(match) if probability is None else probability, probability, None


def _judgement(
    index: int,
    example: Example,
    label: bool,
    match: bool | None,
    confidence: float | None,
    probability: float | None,
    reason: str | None,
) -> Judgement:
    decile = example.decile if label else None
    return Judgement(index, example.window, label, match, confidence, probability, decile, reason)
