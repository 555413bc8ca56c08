"""The judge that compares spellings: how many of the terms in the explanation occur in the window? Needs no model.

``scorers.judges.terms`` extracts the terms. Words are compared case-folded and without their most common endings.
Confidence is the weighted share of terms that occur: earlier terms weigh more, and every further occurrence of a term
counts half as much as the one before. With marks, only occurrences that overlap a mark count. Confidence is not a
probability, so scorers fit its match cut-off. The judge ignores meaning, so it is a lower bound that any other judge
should beat. It does not know labels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from evalkit.markup import words
from evalkit.records import Answer, JudgeItem, Pick, Simulation, Span
from scorers.judges.terms import COMMONEST_WORDS, Term, stem, terms
from scorers.judges.text_units import spread
from scorers.picking import why_no_pick

__all__ = ["LexicalJudge"]

_PUNCTUATION = re.compile(r"[^\w\s]|\n")
_CONTENT_WEIGHT = 10  # weight of a shared content word, relative to a very common word or a punctuation mark


class LexicalJudge:
    """Has no options and no state: an answer depends only on the explanation and the item."""

    name = "lexical"
    version = "1"
    probabilistic = False

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        """One answer per item, in their order. Confidences are in [0, 1)."""
        if not explanation.strip():
            return [Answer(None, reason="the explanation is empty") for _ in items]
        named = terms(explanation)
        return [_answer(named, item) for item in items]

    async def pick(self, groups: Sequence[Sequence[JudgeItem]]) -> Sequence[Pick]:
        """The text of each group that shares the fewest words with the others; in a tie, the first such text.

        Counts the distinct words and punctuation marks that two texts share. A very common word or a punctuation mark
        counts a tenth of another word. Ignores marks.
        """
        return [_pick(group) for group in groups]

    async def simulate(self, explanation: str, windows: Sequence[Sequence[str]]) -> Sequence[Simulation]:
        """1 for every token that belongs to a term of the explanation, 0 for all others."""
        if not explanation.strip():
            return [Simulation(None, "the explanation is empty") for _ in windows]
        named = terms(explanation)
        return [_simulate(named, window) for window in windows]


def _simulate(named: Sequence[Term], window: Sequence[str]) -> Simulation:
    found = [span for term in named for span in _places(term, "".join(window))]
    return Simulation(spread(window, found, [1.0] * len(found)))


def _answer(named: Sequence[Term], item: JudgeItem) -> Answer:
    if not item.text:
        return Answer(None, reason="the text is empty")
    if item.marks is not None and not item.marks:
        return Answer(None, reason="nothing is marked")
    weights = [(rank + 1) ** -0.5 for rank in range(len(named))]
    counts = [_occurrences(term, item.text, item.marks) for term in named]
    found = sum(weight * (1 - 0.5**count) for weight, count in zip(weights, counts, strict=True))
    return Answer(None, confidence=found / sum(weights))


def _occurrences(term: Term, text: str, marks: Sequence[Span] | None) -> int:
    found = _places(term, text)
    if marks is None:
        return len(found)
    return sum(any(start < b and a < end for a, b in marks) for start, end in found)


def _places(term: Term, text: str) -> list[Span]:
    if term.pattern is None:
        return [span for span, stemmed in _words(text) if stemmed == term.word]
    return [match.span() for match in re.finditer(term.pattern, text, re.IGNORECASE)]


def _pick(group: Sequence[JudgeItem]) -> Pick:
    if (reason := why_no_pick(group)) is not None:
        return Pick(None, reason)
    held = [_held(item.text) for item in group]
    shared = [sum(_weight(a & b) for j, b in enumerate(held) if j != i) for i, a in enumerate(held)]
    return Pick(shared.index(min(shared)))


def _weight(shared: frozenset[str]) -> int:
    return sum(1 if unit in COMMONEST_WORDS or _PUNCTUATION.fullmatch(unit) else _CONTENT_WEIGHT for unit in shared)


@lru_cache(maxsize=1 << 12)
def _held(text: str) -> frozenset[str]:
    """The distinct word stems and punctuation marks of a text."""
    return frozenset({*(stemmed for _, stemmed in _words(text)), *_PUNCTUATION.findall(text)})


@lru_cache(maxsize=1 << 12)
def _words(text: str) -> tuple[tuple[Span, str], ...]:
    return tuple(((start, end), stem(text[start:end])) for start, end in words(text))
