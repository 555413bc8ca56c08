"""The explainer that names the words (or punctuation) on which a feature fires. Needs no language model.

Uses the strongest windows of the explain pool and their marks. The units and their weights are defined in ``word_units``:
the weight is the excess activation of the marked occurrences, times the share of occurrences that are marked. A stop word
beside active tokens is mostly unmarked, so its weight is low without any list of stop words, while a feature that fires on
"the" is still explained by "the". Ignores meaning, so it is a lower bound that any other explainer should beat.
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

    ``n_words``: the largest number of units named.
    ``n_examples``: how many of the strongest windows have marks that count; other windows only count as background.
    ``floor``: units below this share of the highest weight are not named.
    ``share``: where the marks are placed; see ``evalkit.markup.marked_tokens``.
    """

    name = "words"
    version = "1"

    def __init__(self, n_words: int = 8, n_examples: int = 20, floor: float = 0.1, share: float = MARK_SHARE) -> None:
        self.n_words, self.n_examples, self.floor, self.share = n_words, n_examples, floor, share

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None = None) -> Explanation:
        """Describe the feature by the words on which it fires. Raises CorpusError if it fires nowhere."""
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
