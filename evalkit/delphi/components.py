"""The explainer, judge and scorers of eai-delphi (extra ``delphi``) as plug-ins, with its prompts, parsers and marks.

``delphi-default`` is its default explainer. ``delphi-detection`` and ``delphi-fuzz`` are its scorers on our windows: the
library places the marks, shuffles the texts, writes the prompts and parses the replies. Every text shown becomes a
judgement; a text without a parsed answer is unscored, with the reply as the reason. Both scorers need the judge ``delphi``,
which holds the client. With our own scorers, this judge answers their questions with the prompts of the library.

Known errors of the library are reproduced (``tests/delphi/test_parity.py`` lists them), unless they would make one feature
depend on another: each feature has its own scorer object, so the order of features has no influence.

Imports the library when a plug-in is created. Reads and writes no files.
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

_UNREAD = "Explanation could not be parsed."  # its explainer returns this text instead of raising
_SEED = 42  # its default seed for shuffles


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
    """The default explainer of the library, with all active windows of the explain pool.

    ``activations``, ``cot``, ``threshold``: options of the library's explainer.
    ``max_tokens``: limit for a reply.
    ``seed``: hashed with each request into the seed that is sent to the client.

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
                expected="a reply with [EXPLANATION]: followed by a phrase",
                seen=repr(str(asking.outcomes[-1])[:80]),
                fix="use a model that follows instructions",
            )
        return Explanation(examples.source, feature, self.name, self.version, found.strip())


class DelphiJudge:
    """Judges with the prompts and the parser of the library.

    ``batch_size``: texts per request.
    ``log_prob``: whether to compute P(match) from the log-probabilities of the reply's tokens.
    ``max_tokens``, ``seed``: as in ``DelphiExplainer``.

    If the last batch is shorter, its prompt requests as many answers as it has texts; the library's own scorers do not.
    Marks are written without any escaping, as in the library. Raises BadConfig, MissingExtra.
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
        """One answer per item, in their order.

        Raises the client's errors, except that a rejected or too long request makes its items unscored. If every request
        is rejected, raises RequestRefused.
        """
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
        """A scorer of the library that uses our client, and the object that records the replies."""
        asking = Asking(self.client, self.seed, self._max_tokens)
        return make(asking, n_examples_shown=n_shown, log_prob=self.log_prob, seed=_SEED + repeat, **options), asking


class _DelphiScorer:
    """The base of the library's two scorers.

    ``batch_size``, ``log_prob``, ``max_tokens``: options of the judge ``delphi`` that the scorer uses.
    ``options``: options of the library's scorer.
    """

    name: str
    _class: str
    own_judge = "delphi"  # instances add their options

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
        """One judgement per text shown. Raises BadConfig for a judge other than ``own_judge``, and ClientError."""
        if not isinstance(judge, DelphiJudge):
            raise BadConfig(
                f"scorer {self.name!r}",
                expected="its own judge, 'delphi'",
                seen=repr(judge.name),
                fix="pass that judge, or let the run create it",
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
    """The library's detection: active and inactive windows, without marks."""

    name = "delphi-detection"
    _class = "DetectionScorer"

    def __init__(self, batch_size: int = 5, log_prob: bool = False, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__(batch_size, log_prob, max_tokens)


class DelphiFuzzScorer(_DelphiScorer):
    """The library's fuzzing: true marks on active windows, false marks on inactive windows.

    ``fuzz_type``: "default", or "active" to put the false marks on the same windows as the true marks.
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
    """Raise errors that do not concern single texts.

    These are all errors but rejected and too long requests; and the rejection, if every request was rejected.
    """
    errors = [one for one in outcomes if isinstance(one, EvalkitError)]
    for error in errors:
        if not isinstance(error, RequestRefused | ContextOverflow):
            raise error
    if errors and len(errors) == len(outcomes) and all(isinstance(error, RequestRefused) for error in errors):
        raise errors[0]


def _sample(item: JudgeItem) -> Any:
    """A text with its marks as a sample of the library. The label is unknown here and never shown; it is set to False."""
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
    """Match, confidence, probability, and the reason if there is no match decision."""
    if output.prediction is None:
        if isinstance(outcome, EvalkitError):
            return None, None, None, str(outcome)
        where = "" if size == n_shown else f", although the last batch has only {size} texts"
        return None, None, None, f"eai-delphi requires a list of {n_shown} answers{where}: {outcome[:80]!r}"
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
