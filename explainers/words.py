"""The explainer that needs no language model: names the words (or punctuation) that a feature fires on.

Reads the strongest windows of the explain pool and their marks. A unit is a whole word of the text, joined from its
tokens, or what a token holds of the text between words. Its weight is the excess activation summed over its marked
occurrences, times the share of all its occurrences that are marked: a stop word beside every active token is mostly
unmarked there and in the negatives, so it falls behind without any list of stop words, while a feature that does fire on
"the" still says so. It knows nothing of meaning, so it is a floor that any other explainer should beat.
"""

from __future__ import annotations

from collections.abc import Sequence

from evalkit.markup import MARK_SHARE, marked_tokens
from evalkit.protocols import Client
from evalkit.records import ExplainExamples, Explanation, FeatureId
from explainers.word_units import Kind, Tally, heaviest, nothing_active, phrase_of, units

__all__ = ["WordsExplainer"]


class WordsExplainer:
    """Writes "words such as X, Y, Z", or "the word X".

    ``n_words``: at most so many units are named. ``n_examples``: the strongest windows whose marks count; the other
    windows count as background only. ``floor``: units below this share of the best one's weight are not named.
    ``share`` places the marks, see ``evalkit.markup.marked_tokens``.
    """

    name = "words"
    version = "1"

    def __init__(self, n_words: int = 8, n_examples: int = 20, floor: float = 0.1, share: float = MARK_SHARE) -> None:
        self.n_words, self.n_examples, self.floor, self.share = n_words, n_examples, floor, share

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None = None) -> Explanation:
        """Describe the feature by what it fires on. Raises CorpusError where it fires on nothing."""
        tallies = self._tallies(examples)
        if not tallies:
            raise nothing_active(feature, examples)
        text = phrase_of(tallies, self.floor, self.n_words, _clause)
        return Explanation(examples.source, feature, self.name, self.version, text)

    def _tallies(self, examples: ExplainExamples) -> list[Tally]:
        found: dict[tuple[Kind, str], Tally] = {}
        strongest = sorted(examples.positives, key=lambda example: -example.peak)
        for place, example in enumerate([*strongest, *examples.negatives]):
            counts = place < min(self.n_examples, len(strongest))
            flags = marked_tokens(example.activations, examples.threshold, self.share)
            scale = max(examples.peak, example.peak) - examples.threshold
            for there in units(example):
                unit = found.setdefault((there.kind, there.text.casefold()), Tally(there.kind))
                if not any(flags[token] for token in there.tokens):
                    unit.silent += 1
                elif counts:
                    excess = max(example.activations[token] for token in there.tokens) - examples.threshold
                    unit.mark(there.text, excess / scale)
        return heaviest(found)


def _clause(kind: Kind, tallies: Sequence[Tally]) -> str:
    named = [one.form for one in tallies]
    if kind == "word":
        return f"the word {named[0]}" if len(named) == 1 else "words such as " + ", ".join(named)
    if kind == "punctuation":
        return "the punctuation " + " and ".join(f'"{form}"' for form in named)
    return " and ".join(named)
