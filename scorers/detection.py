"""Detection: can a judge with the explanation tell windows where the feature fires from windows where it does not?

Windows are shown without marks, in a random order drawn per feature. Does not depend on any particular judge.
"""

from __future__ import annotations

from evalkit.records import JudgeItem, ScoreExamples, TestExamples
from scorers.trials import Trial, TrialScorer

__all__ = ["DetectionScorer"]


class DetectionScorer(TrialScorer):
    """Tests windows where the feature fires (positives) against windows verified inactive (negatives)."""

    name = "detection"
    version = "1"

    def _trials(self, examples: ScoreExamples, part: str) -> list[Trial]:
        windows: TestExamples = getattr(examples, part)
        trials = [Trial.of(example, True, JudgeItem(example.text)) for example in windows.positives]
        trials += [Trial.of(example, False, JudgeItem(example.text)) for example in windows.negatives]
        return self._shuffle(trials, examples, part)
