"""Simulation: how well do activations predicted from the explanation follow the true ones, token by token?

A judge that can simulate predicts the activation of every token of windows where the feature fires and of windows
verified inactive. The score is Pearson's correlation of predictions with true activations over all tokens of all windows
of a feature, inactive windows included, so the unit of the predictions does not matter. Each window is one judgement and
carries the sums from which the correlation is computed. Does not depend on any particular judge; reads and writes nothing.

Source: Bills et al. 2023, "Language models can explain neurons in language models" (OpenAI).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from evalkit.errors import BadConfig
from evalkit.protocols import SimulatingJudge
from evalkit.records import Example, Explanation, JudgeItem, Judgement, Score, ScoreExamples, Simulation
from evalkit.seeds import generator

__all__ = ["SimulationScorer", "moments"]

_LARGEST = 1e100  # keeps the sums of squares of predictions finite


class SimulationScorer:
    """Simulates windows of the score pool.

    ``n_windows``: the largest number of positives, and of negatives; None uses all.

    The default is below detection's because simulation is expensive (one request per window, one prediction per token) and
    scores vary far more between features than between samples of a feature's windows: with 50 windows instead of 20, the
    standard error of a mean over features was only 2% smaller.

    Raises BadConfig if ``n_windows`` is below 1.
    """

    name = "simulation"
    version = "1"
    asks = "simulate"

    def __init__(self, n_windows: int | None = 20) -> None:
        if n_windows is not None and n_windows < 1:
            raise BadConfig(
                "n_windows of scorer 'simulation'", expected="at least 1, or null", seen=str(n_windows), fix="use 20"
            )
        self.n_windows = n_windows

    async def score(self, explanation: Explanation, examples: ScoreExamples, judge: SimulatingJudge) -> Score:
        """One judgement per window, in the order they were asked."""
        windows = self._windows(examples)
        simulations = list(await judge.simulate(explanation.text, [one.tokens for one in windows])) if windows else []
        if len(simulations) != len(windows):
            reason = f"the judge gave {len(simulations)} simulations of {len(windows)} windows"
            simulations = [Simulation(None, reason)] * len(windows)
        positives = {example.window for example in examples.test.positives}
        judgements = tuple(
            _judgement(index, example, example.window in positives, examples.threshold, simulation)
            for index, (example, simulation) in enumerate(zip(windows, simulations, strict=True))
        )
        return Score(explanation.source, explanation.feature, self.name, self.version, judgements)

    def items(self, examples: ScoreExamples) -> Sequence[JudgeItem]:
        """Empty, because the judge is asked for simulations and not about items."""
        return []

    def _windows(self, examples: ScoreExamples) -> list[Example]:
        """The windows to simulate: the same for every repeat, in another order."""
        test = examples.test
        chosen = [
            *self._chosen("positives", test.positives, examples),
            *self._chosen("negatives", test.negatives, examples),
        ]
        ordered = sorted(chosen, key=lambda example: example.window)
        names = (examples.source, examples.feature, self.name, f"repeat {examples.repeat}")
        return [ordered[index] for index in generator(examples.seed, *names).permutation(len(ordered))]

    def _chosen(self, kind: str, windows: Sequence[Example], examples: ScoreExamples) -> list[Example]:
        """A random sample of ``n_windows`` windows, spread as evenly over the deciles as possible."""
        ordered = sorted(windows, key=lambda example: example.window)
        random = generator(examples.seed, examples.source, examples.feature, self.name, kind)
        shuffled = [ordered[index] for index in random.permutation(len(ordered))]
        seen: Counter[int | None] = Counter()
        rounds = []
        for example in shuffled:
            rounds.append(seen[example.decile])
            seen[example.decile] += 1
        by_round = sorted(range(len(shuffled)), key=lambda place: rounds[place])  # stable: random within a round
        return [shuffled[place] for place in by_round[: self.n_windows]]


def moments(predicted: Sequence[float], true: Sequence[float]) -> tuple[float, ...]:
    """(n, Σx, Σy, Σx², Σy², Σxy) of predictions x and activations y, each sum rounded once."""
    pairs = list(zip(predicted, true, strict=True))
    return (
        float(len(pairs)),
        math.fsum(x for x, _ in pairs),
        math.fsum(y for _, y in pairs),
        math.fsum(x * x for x, _ in pairs),
        math.fsum(y * y for _, y in pairs),
        math.fsum(x * y for x, y in pairs),
    )


def _judgement(item: int, example: Example, label: bool, threshold: float, simulation: Simulation) -> Judgement:
    found = reason = None
    if simulation.values is None:
        reason = simulation.reason or "the judge gave no prediction"
    elif len(simulation.values) != len(example.tokens):
        reason = f"the judge gave {len(simulation.values)} values for {len(example.tokens)} tokens"
    elif not all(math.isfinite(value) and abs(value) < _LARGEST for value in simulation.values):
        reason = "a predicted activation is not a finite number"
    else:
        true = [max(0.0, float(value) - threshold) for value in example.activations]
        found = moments([float(value) for value in simulation.values], true)
    return Judgement(
        item=item,
        window=example.window,
        label=label,
        match=None,
        confidence=None,
        probability=None,
        decile=example.decile,
        reason=reason,
        moments=found,
    )
