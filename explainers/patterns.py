"""The offline explainer that looks for patterns: what a feature fires on, after what, and what these places have in common.

Reads all windows it is shown, marked and silent. It writes the words (or punctuation) that carry most activation, as the
explainer ``words`` weighs them; a word seen active once only says little by itself, so it is shown with the word before
it. Behind them, in brackets, stands one pattern that they share, where there is one: numbers, capitals, beginnings and
endings of words, what comes before, brackets and quotation marks, beginnings of sentences and lines. Patterns compete by
how many nats of the marks they explain, less what it takes to say which of its kind it is and to spell it out (minimum
description length: Rissanen 1978), so a pattern that a few words happen to share is not mentioned. Knows no meanings.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from evalkit.markup import MARK_SHARE, marked_tokens
from evalkit.protocols import Client
from evalkit.records import Example, ExplainExamples, Explanation, FeatureId
from explainers.word_units import Kind, Tally, heaviest, nothing_active, phrase_of, units

__all__ = ["PatternsExplainer", "shared_pattern"]

_NATS_PER_WORD = 4.0  # what a word of a pattern's name costs
_LEAST_SHARE = 0.25  # of the marked units, that a pattern must cover
_LEAST_WORDS = 4  # different ones that a pattern must cover
_LONGEST = 40  # characters of one word
_ONE_WORD = "the word "
_FIXED: dict[str, re.Pattern[str]] = {
    "numbers": re.compile(r"\d+"),
    "capitalised words": re.compile(r"[^\W\d_a-z][^\W\d_A-Z]+"),
    "words in capitals": re.compile(r"[^\W\d_a-z]{2,}"),
    "single letters": re.compile(r"[^\W\d_]"),
    "names with underscores": re.compile(r"\w*_\w*"),
    "camelCase names": re.compile(r"\w*[a-z][A-Z]\w*"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A unit where it stands. ``excess`` is 0 where it is not marked; ``before`` are the two words before, "" without."""

    kind: Kind
    text: str
    excess: float
    before: tuple[str, str]
    first_of_sentence: bool
    first_of_line: bool
    in_brackets: bool
    in_quotes: bool


@dataclass(slots=True)
class _Tally(Tally):
    """``before``: the word before its last marked place."""

    before: str = ""

    @property
    def plain(self) -> str:
        """Its form on one line and not too long."""
        text = " ".join("".join(letter if letter.isprintable() else " " for letter in self.form).split())
        return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


class PatternsExplainer:
    """Writes "Darcy, Mr Bingley, of Hertfordshire (capitalised words)", or only the words or only the punctuation.

    ``n_words``: at most so many units are named. ``floor``: units below this share of the best one's weight are not named.
    ``share`` places the marks, see ``evalkit.markup.marked_tokens``.
    """

    name = "patterns"
    version = "1"

    def __init__(self, n_words: int = 10, floor: float = 0.1, share: float = MARK_SHARE) -> None:
        self.n_words, self.floor, self.share = n_words, floor, share

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None = None) -> Explanation:
        """Describe the feature by where it fires. Raises CorpusError where it fires on nothing."""
        windows = sorted(examples.positives, key=lambda example: (-example.peak, example.window))
        places = [list(_places(one, examples, self.share)) for one in (*windows, *examples.negatives)]
        weighed = _weighed(place for window in places for place in window)
        if not weighed:
            raise nothing_active(feature, examples)
        text = phrase_of(weighed, self.floor, self.n_words, _clause)
        if pattern := shared_pattern([place for window in places for place in window]):
            text = f"{text.removeprefix(_ONE_WORD)} ({pattern})"
        return Explanation(examples.source, feature, self.name, self.version, text)


def _clause(kind: Kind, named: Sequence[_Tally]) -> str:
    if kind == "word" and len(named) == 1:
        return _ONE_WORD + named[0].plain
    if kind == "word":
        return ", ".join(f"{one.before} {one.plain}" if one.marked == 1 and one.before else one.plain for one in named)
    if kind == "punctuation":
        return "the punctuation " + " and ".join(f'"{one.plain}"' for one in named)
    return " and ".join(one.plain for one in named)


def _places(example: Example, examples: ExplainExamples, share: float) -> Iterator[Place]:
    """The units of a window where they stand. ``excess`` is relative to the feature's peak."""
    flags = marked_tokens(example.activations, examples.threshold, share)
    scale = max(examples.peak, example.peak) - examples.threshold
    before, opens_sentence, opens_line = ("", ""), True, False
    brackets, quoted, end = 0, False, 0
    for unit in units(example):
        opens_line |= "\n" in example.text[end : unit.start]
        fired = any(flags[token] for token in unit.tokens)
        excess = max(example.activations[token] for token in unit.tokens) - examples.threshold if fired else 0.0
        yield Place(
            unit.kind,
            unit.text,
            excess / scale if fired else 0.0,
            before,
            opens_sentence,
            opens_line,
            brackets > 0,
            quoted,
        )
        if unit.kind == "word":
            before, opens_sentence, opens_line = (before[1], unit.text), False, False
        elif unit.kind == "punctuation":
            opens_sentence |= bool(re.search(r"[.!?]", unit.text))
            brackets = max(0, brackets + sum(unit.text.count(one) for one in "([{") - sum(map(unit.text.count, ")]}")))
            quoted ^= unit.text.count('"') % 2 == 1
        elif unit.text == "line breaks":
            opens_sentence = opens_line = True
        end = unit.start + (0 if unit.kind == "space" else len(unit.text))


def _weighed(places: Iterable[Place]) -> list[_Tally]:
    found: dict[tuple[Kind, str], _Tally] = {}
    for place in places:
        one = found.setdefault((place.kind, place.text.casefold()), _Tally(place.kind))
        if not place.excess:
            one.silent += 1
            continue
        one.mark(place.text, place.excess)
        one.before = place.before[1] if len(place.before[1]) <= _LONGEST else ""
    return heaviest(found)


def shared_pattern(places: Sequence[Place]) -> str | None:
    """The pattern that explains most of the marks on words for its length, None where none pays for itself."""
    n, marked = len(places), sum(place.excess > 0 for place in places)
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    covered: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for place in places:
        for pattern in _patterns(place):
            counts[pattern][0] += place.excess > 0
            counts[pattern][1] += 1
            if place.excess:
                covered[pattern][place.text.casefold()] += 1
    sizes = Counter(family for family, _ in counts)
    best: tuple[float, str] | None = None
    for (family, text), (hits, there) in counts.items():
        different = covered[family, text]
        if hits * n <= there * marked or hits < _LEAST_SHARE * marked or len(different) < _LEAST_WORDS:
            continue
        gain = _nats(hits, there) + _nats(marked - hits, n - there) - _nats(marked, n)
        gain -= math.log(max(sizes[family], 2)) + _NATS_PER_WORD * len(text.split())
        if gain > 0 and (best is None or (-gain, text) < (-best[0], best[1])):
            best = gain, text
    return None if best is None else best[1]


def _patterns(place: Place) -> Iterator[tuple[str, str]]:
    """The patterns a word is an instance of: (family, text). One family's patterns are told apart at a cost."""
    if place.kind != "word":
        return
    word = place.text.casefold()
    for text, form in _FIXED.items():
        if form.fullmatch(place.text) and not (text == "capitalised words" and place.first_of_sentence):
            yield "fixed", text
    if place.first_of_sentence:
        yield "fixed", "the first word of a sentence"
    if place.first_of_line:
        yield "fixed", "the first word of a line"
    if place.in_brackets:
        yield "fixed", "words in brackets"
    if place.in_quotes:
        yield "fixed", "words in quotation marks"
    if word.isalpha():
        for length in (2, 3, 4):
            if len(word) >= length + 2:
                yield "ending", f"words ending in -{word[-length:]}"
                yield "beginning", f"words beginning with {word[:length]}-"
    if last := place.before[1].casefold():
        yield "word before", f'words after "{last}"'
        if place.before[0]:
            yield "words before", f'words after "{place.before[0].casefold()} {last}"'


def _nats(hits: int, there: int) -> float:
    """Log-likelihood of so many marks among so many, at the rate that a prior of half a mark in one smooths."""
    rate = (hits + 0.5) / (there + 1)
    return hits * math.log(rate) + (there - hits) * math.log1p(-rate)
