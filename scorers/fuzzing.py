"""Fuzzing: can a judge with the explanation tell true marks from false ones, in windows where the feature fires?

The feature fires in every window. Positives carry the true marks; decoys, which are other windows, carry false marks that
match true marks in number, lengths and positions (``scorers.marking``). If a window has no room for false marks of the
shape of its true ones, its judgement is unscored, whether it is a positive or a decoy: if only such decoys were left out,
long marks would identify positives. Does not depend on any particular judge.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evalkit.markup import spans
from evalkit.records import Example, JudgeItem, ScoreExamples, TestExamples
from evalkit.seeds import generator
from scorers.marking import false_marks, start_counts, true_marks
from scorers.trials import Trial, TrialScorer

__all__ = ["FuzzingScorer"]

NOT_ACTIVE = "no token of the window is above the threshold"
NO_ROOM = "no room in the window for false marks of the shape of its true ones"


class FuzzingScorer(TrialScorer):
    """Tests windows with true marks (positives) against windows with false marks (decoys)."""

    name = "fuzzing"
    version = "2"

    def _trials(self, examples: ScoreExamples, part: str) -> list[Trial]:
        windows: TestExamples = getattr(examples, part)
        starts = start_counts([*windows.positives, *windows.decoys], examples.threshold)
        trials = [self._trial(example, True, examples, starts) for example in windows.positives]
        trials += [self._trial(example, False, examples, starts) for example in windows.decoys]
        return self._shuffle(trials, examples, part)

    def _trial(self, example: Example, label: bool, examples: ScoreExamples, starts: NDArray[np.int64]) -> Trial:
        true = true_marks(example, examples.threshold)
        if not any(true):
            return Trial.of(example, label, None, NOT_ACTIVE)
        # one generator per window: positions differ between windows and do not depend on the order of work
        random = generator(examples.seed, examples.source, examples.feature, self.name, "marks", example.window)
        false = false_marks(example, examples.threshold, starts, random)
        if false is None:
            return Trial.of(example, label, None, NO_ROOM)
        marks = spans(example.tokens, true if label else false)
        return Trial.of(example, label, JudgeItem(example.text, marks))
