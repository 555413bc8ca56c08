"""Detection: can a judge with the explanation tell windows where the feature fires from windows where it does not?

Windows are shown without marks, in an order drawn per feature. Knows nothing of any judge.
"""

from __future__ import annotations

from collections.abc import Sequence

from evalkit.protocols import Judge
from evalkit.records import Explanation, JudgeItem, Score, ScoreExamples, TestExamples
from scorers.trials import Trial, hold_test, shuffle

__all__ = ["DetectionScorer"]


class DetectionScorer:
    """Positives are windows where the feature fires, negatives windows verified inactive."""

    name = "detection"
    version = "1"

    async def score(self, explanation: Explanation, examples: ScoreExamples, judge: Judge) -> Score:
        """As many judgements as there are positives and negatives, in the order they were asked."""
        test, calibration = (self._trials(examples, part) for part in ("test", "calibration"))
        return await hold_test(self.name, self.version, explanation, judge, test, calibration)

    def items(self, examples: ScoreExamples) -> Sequence[JudgeItem]:
        """Every item a judge may be asked for these examples, for judges that prepare in bulk."""
        trials = [*self._trials(examples, "test"), *self._trials(examples, "calibration")]
        return [trial.item for trial in trials if trial.item is not None]

    def _trials(self, examples: ScoreExamples, part: str) -> list[Trial]:
        windows: TestExamples = getattr(examples, part)
        trials = [Trial.of(example, True, JudgeItem(example.text)) for example in windows.positives]
        trials += [Trial.of(example, False, JudgeItem(example.text)) for example in windows.negatives]
        return shuffle(trials, examples.seed, examples.source, examples.feature, self.name, part)
