"""The units that explainers without a language model count: words, punctuation and white space of windows.

A unit is a whole word of the text, joined from its tokens, or the punctuation or white space in one token. The weight of a
unit is its excess activation, summed over its marked occurrences in all windows, times the share of its occurrences that
are marked. Pure functions of windows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, TypeVar

from evalkit.errors import CorpusError
from evalkit.markup import token_spans, words
from evalkit.records import Example, ExplainExamples, FeatureId

__all__ = ["Kind", "Tally", "Unit", "heaviest", "nothing_active", "phrase_of", "units"]

Kind: TypeAlias = Literal["word", "punctuation", "space"]
_KINDS: tuple[Kind, ...] = ("word", "punctuation", "space")
_KIND_SHARE = 0.25  # a kind of unit is mentioned only if it has this share of all weight


@dataclass(frozen=True, slots=True)
class Unit:
    """One occurrence of a unit in a window.

    ``text``: the unit as it is written; for white space its name, such as "line breaks".
    ``start``: the character position at which it begins.
    ``tokens``: the positions of the tokens that contain parts of it.
    """

    kind: Kind
    text: str
    start: int
    tokens: tuple[int, ...]


@dataclass(slots=True)
class Tally:
    """The counts of one unit, case-folded, over all windows.

    ``excess``: the sum of its excess activations, relative to the feature's peak.
    ``marked`` and ``silent``: the number of occurrences with and without a mark.
    ``forms``: the sum of excess activations per spelling.
    """

    kind: Kind
    excess: float = 0.0
    marked: int = 0
    silent: int = 0
    forms: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def mark(self, text: str, excess: float) -> None:
        """Count a marked occurrence, spelled ``text``."""
        self.excess += excess
        self.marked += 1
        self.forms[text] += excess

    @property
    def weight(self) -> float:
        return self.excess * self.marked / (self.marked + self.silent + 1)

    @property
    def form(self) -> str:
        """The spelling with the most activation."""
        return min(self.forms, key=lambda form: (-self.forms[form], form))


AnyTally = TypeVar("AnyTally", bound=Tally)


def heaviest(found: Mapping[tuple[Kind, str], AnyTally]) -> list[AnyTally]:
    """The units with a marked occurrence, heaviest first; units of equal weight in alphabetical order."""
    marked = [(key, one) for key, one in found.items() if one.marked]
    return [one for _, one in sorted(marked, key=lambda pair: (-pair[1].weight, pair[0]))]


def phrase_of(
    tallies: Sequence[AnyTally], floor: float, most: int, clause: Callable[[Kind, Sequence[AnyTally]], str]
) -> str:
    """One clause per kind of unit with enough weight, the heaviest kind first.

    ``most``: the largest number of units in a clause.
    ``floor``: units below this share of the highest weight of their kind are left out.
    ``clause``: writes the clause of a kind of unit.
    """
    total = sum(one.weight for one in tallies)
    clauses: list[tuple[float, str]] = []
    for kind in _KINDS:
        mine = [one for one in tallies if one.kind == kind]
        weight = sum(one.weight for one in mine)
        if mine and weight >= _KIND_SHARE * total:
            named = [one for one in mine if one.weight >= floor * mine[0].weight]
            clauses.append((-weight, clause(kind, named[:most])))
    return "; ".join(text for _, text in sorted(clauses))


def nothing_active(feature: FeatureId, examples: ExplainExamples) -> CorpusError:
    """The error for a feature that fires in none of its windows."""
    return CorpusError(
        f"{examples.source} feature {feature}",
        expected=f"a window with a token above the threshold {examples.threshold:g}",
        seen=f"none in {len(examples.positives)} windows",
        fix="collect more text, or leave this feature out",
    )


def units(example: Example) -> list[Unit]:
    """The units of a window, in the order of the text.

    A token belongs to the units that it overlaps; white space at its ends does not count, unless it is all white space.
    """
    text = example.text
    found: list[Unit] = []
    carriers: dict[tuple[int, int], list[int]] = {span: [] for span in words(text)}
    owner = {place: span for span in carriers for place in range(*span)}
    for position, (start, end) in enumerate(token_spans(example.tokens)):
        token = text[start:end]
        if not token.strip():
            if token:
                found.append(Unit("space", _space_name(token), start, (position,)))
            continue
        start, end = end - len(token.lstrip()), start + len(token.rstrip())
        between = ""
        for place in range(start, end + 1):
            if place < end and place not in owner:
                between += text[place]
                continue
            if between.strip():
                found.append(Unit("punctuation", between.strip(), place - len(between.lstrip()), (position,)))
            between = ""
            if place < end and (not carriers[owner[place]] or carriers[owner[place]][-1] != position):
                carriers[owner[place]].append(position)
    found += [Unit("word", text[start:end], start, tuple(tokens)) for (start, end), tokens in carriers.items()]
    return sorted(found, key=lambda unit: unit.start)


def _space_name(token: str) -> str:
    if "\n" in token or "\r" in token:
        return "line breaks"
    return "tabs" if "\t" in token else "runs of spaces"
