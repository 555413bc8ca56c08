"""The steps that scorers share: order the questions, query the judge, compare its answers with the labels.

A trial is one question with its label; the judge sees only the question. Pure, except for calls to the given judge.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evalkit.protocols import Judge
from evalkit.records import Answer, Example, Explanation, JudgeItem, Judgement, Score, ScoreExamples
from evalkit.seeds import generator
from scorers.cutoff import fit_cutoff

__all__ = ["Trial", "TrialScorer", "hold_test", "shuffle"]


@dataclass(frozen=True, slots=True)
class Trial:
    """One window of a test.

    ``item``: the question to the judge; None if the window allows none.
    ``reason``: why there is no question; the window is then an unscored judgement.
    """

    window: int
    label: bool
    item: JudgeItem | None
    decile: int | None = None
    reason: str | None = None

    @classmethod
    def of(cls, example: Example, label: bool, item: JudgeItem | None, reason: str | None = None) -> Trial:
        return cls(example.window, label, item, example.decile, reason)


def shuffle(trials: Sequence[Trial], seed: int, *names: str | int) -> list[Trial]:
    """The trials in an order that depends on (seed, names) and the set of windows, not on the order of ``trials``."""
    ordered = sorted(trials, key=lambda trial: (trial.window, trial.label))
    return [ordered[index] for index in generator(seed, *names).permutation(len(ordered))]


class TrialScorer(ABC):
    """A scorer whose test is a list of trials. A subclass makes the trials of the test and of the calibration."""

    name: str
    version: str

    async def score(self, explanation: Explanation, examples: ScoreExamples, judge: Judge) -> Score:
        """One judgement per trial of the test, in the order they were asked."""
        test, calibration = (self._trials(examples, part) for part in ("test", "calibration"))
        return await hold_test(self.name, self.version, explanation, judge, test, calibration)

    def items(self, examples: ScoreExamples) -> Sequence[JudgeItem]:
        """Every item that a judge may be asked about for these examples, for judges that prepare in bulk."""
        trials = [*self._trials(examples, "test"), *self._trials(examples, "calibration")]
        return [trial.item for trial in trials if trial.item is not None]

    @abstractmethod
    def _trials(self, examples: ScoreExamples, part: str) -> list[Trial]:
        """The trials of one part of the examples, "test" or "calibration", in the order they are asked."""

    def _shuffle(self, trials: Sequence[Trial], examples: ScoreExamples, part: str) -> list[Trial]:
        """The trials in an order drawn separately for every feature, scorer, part and repeat."""
        again = [f"repeat {examples.repeat}"] if examples.repeat else []
        return shuffle(trials, examples.seed, examples.source, examples.feature, self.name, part, *again)


async def hold_test(
    name: str,
    version: str,
    explanation: Explanation,
    judge: Judge,
    test: Sequence[Trial],
    calibration: Sequence[Trial],
) -> Score:
    """The score of one test: one judgement per trial, in the order of the trials.

    For answers without a match decision, a cut-off is fitted on ``calibration``; the judge is queried about these trials
    only if there are such answers.
    """
    answers = await _ask(judge, explanation.text, test)
    cutoff = None
    if any(_needs_cutoff(answer) for answer in answers):
        known = zip(await _ask(judge, explanation.text, calibration), calibration, strict=True)
        pairs = [(a.confidence, trial.label) for a, trial in known if a.confidence is not None and a.reason is None]
        cutoff = fit_cutoff([confidence for confidence, _ in pairs], [label for _, label in pairs])
        answers = [_decide(answer, cutoff) if _needs_cutoff(answer) else answer for answer in answers]
    judgements = tuple(
        Judgement(
            item=index,
            window=trial.window,
            label=trial.label,
            match=answer.match,
            confidence=answer.confidence,
            probability=answer.probability,
            decile=trial.decile,
            reason=answer.reason,
        )
        for index, (trial, answer) in enumerate(zip(test, answers, strict=True))
    )
    return Score(explanation.source, explanation.feature, name, version, judgements, cutoff)


async def _ask(judge: Judge, explanation: str, trials: Sequence[Trial]) -> list[Answer]:
    """One answer per trial.

    A trial without a question is unscored. If the judge returns the wrong number of answers, all trials are.
    """
    asked = [trial.item for trial in trials if trial.item is not None]
    answers = list(await judge.judge(explanation, asked)) if asked else []
    if len(answers) != len(asked):
        reason = f"the judge gave {len(answers)} answers to {len(asked)} items"
        answers = [Answer(None, reason=reason)] * len(asked)
    given = iter(answers)
    return [Answer(None, reason=trial.reason) if trial.item is None else _sound(next(given)) for trial in trials]


def _sound(answer: Answer) -> Answer:
    """The answer; or an unscored answer with a reason, if it has no usable value."""
    if answer.match is None and answer.reason is None and answer.confidence is None:
        return replace(answer, reason="the judge gave neither a match nor a confidence")
    numbers = (answer.confidence, answer.probability)
    if any(number is not None and not math.isfinite(number) for number in numbers):
        return Answer(None, reason=answer.reason or "the judge's confidence is not a finite number")
    if answer.match is None:
        return answer
    return replace(answer, match=bool(answer.match), reason=None)


def _needs_cutoff(answer: Answer) -> bool:
    return answer.match is None and answer.reason is None


def _decide(answer: Answer, cutoff: float | None) -> Answer:
    if cutoff is None or answer.confidence is None:
        return replace(answer, reason="no match cut-off: the calibration windows lack one of the two labels")
    return replace(answer, match=answer.confidence > cutoff)
