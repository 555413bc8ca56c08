"""The explainer that names the words on which a feature fires and one pattern that they share. Needs no language model.

Uses all windows of the explain pool, active and inactive. Writes the words (or punctuation) with the highest weight, as the
explainer ``words`` computes it. A word that was active only once says little by itself, so it is written with the word
before it. One shared pattern may follow in brackets: numbers, capitals, beginnings or endings of words, preceding words,
brackets, quotation marks, beginnings of sentences or lines. The pattern is the one with the shortest description of the
marks (minimum description length, Rissanen 1978): the nats by which it explains them, minus the nats to select it within
its family and to spell it out. A pattern that a few words share by chance is therefore not mentioned. Ignores meaning.
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

_NATS_PER_WORD = 4.0  # cost of each word in the name of a pattern
_LEAST_SHARE = 0.25  # share of the marked units that a pattern must cover
_LEAST_WORDS = 4  # number of different words that a pattern must cover
_LONGEST = 40  # characters of a word; longer words are cut
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
    """One occurrence of a unit in a window.

    ``excess``: its excess activation, relative to the feature's peak; 0 if it is not marked.
    ``before``: the two words before it, "" where there are fewer.
    """

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
    """A tally with ``before``, the word before the last marked occurrence."""

    before: str = ""

    @property
    def plain(self) -> str:
        """The spelling of the unit, on one line and cut to ``_LONGEST`` characters."""
        text = " ".join("".join(letter if letter.isprintable() else " " for letter in self.form).split())
        return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


class PatternsExplainer:
    """Writes texts such as "Darcy, Mr Bingley, of Hertfordshire (capitalised words)".

    ``n_words``: the largest number of units named.
    ``floor``: units below this share of the highest weight are not named.
    ``share``: where the marks are placed; see ``evalkit.markup.marked_tokens``.
    """

    name = "patterns"
    version = "1"

    def __init__(self, n_words: int = 10, floor: float = 0.1, share: float = MARK_SHARE) -> None:
        self.n_words, self.floor, self.share = n_words, floor, share

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None = None) -> Explanation:
        """Describe the feature by the words on which it fires. Raises CorpusError if it fires nowhere."""
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
    """The occurrences of units in a window, in the order of the text."""
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
    """The pattern that saves the most nats in describing the marks on words; None if no pattern saves any."""
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
    """The patterns that an occurrence matches, as (family, text). Larger families make each of their patterns costlier."""
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
    """Log-likelihood, in nats, of ``hits`` marks among ``there`` occurrences, at the rate (hits + ½) / (there + 1)."""
    rate = (hits + 0.5) / (there + 1)
    return hits * math.log(rate) + (there - hits) * math.log1p(-rate)
