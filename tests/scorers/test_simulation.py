"""Simulation: which windows are asked for, what a correlation is made of, and what becomes of a reply that is none."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalkit.errors import BadConfig
from evalkit.records import Example, Score, ScoreExamples, Simulation, TestExamples
from evalkit.registry import create
from evalkit.stats.metrics import score_features
from scorers.simulation import SimulationScorer, moments
from tests.support.builders import EXPLANATION, examples, random_test, window

TEST = random_test(30, seed=0)


class Simulator:
    """Predicts with a function of a window's tokens; remembers what it was given."""

    name, version, probabilistic = "simulator", "1", True

    def __init__(self, values: Callable[[Sequence[str]], Simulation]) -> None:
        self.values = values
        self.asked: list[tuple[str, ...]] = []

    async def simulate(self, explanation: str, windows: Sequence[Sequence[str]]) -> Sequence[Simulation]:
        assert explanation == EXPLANATION.text
        self.asked += [tuple(one) for one in windows]
        return [self.values(one) for one in windows]


def simulate(
    judge: Simulator, given: ScoreExamples | None = None, scorer: SimulationScorer | None = None
) -> tuple[Score, dict[int, Example]]:
    given = given or examples(TEST)
    score = asyncio.run((scorer or SimulationScorer()).score(EXPLANATION, given, judge))
    return score, {one.window: one for one in (*given.test.positives, *given.test.negatives)}


def pearson(score: Score) -> float:
    judgements = [one for one in score.judgements if one.moments]
    return float(
        score_features(
            "pearson",
            feature=np.array(["7"] * len(judgements)),
            window=np.array([one.window for one in judgements]),
            label=np.array([one.label for one in judgements]),
            match=np.full(len(judgements), np.nan),
            confidence=np.full(len(judgements), np.nan),
            moments=np.array([one.moments for one in judgements]),
        ).values[0]
    )


def noisy(tokens: Sequence[str]) -> Simulation:
    """Noise that depends on the window alone."""
    random = np.random.default_rng([ord(character) for character in tokens[0]])
    return Simulation(tuple(random.normal(size=len(tokens)).tolist()))


def test_the_score_is_the_correlation_over_all_tokens_of_all_windows() -> None:
    judge = Simulator(noisy)
    score, by_window = simulate(judge)
    predicted = np.concatenate([noisy(by_window[one.window].tokens).values for one in score.judgements])  # type: ignore[misc]
    true = np.concatenate([by_window[one.window].activations for one in score.judgements])
    assert pearson(score) == pytest.approx(np.corrcoef(predicted, true)[0, 1], abs=1e-12)
    assert (score.source, score.feature, score.scorer, score.version) == ("source", "7", "simulation", "1")


def test_the_truth_correlates_perfectly_in_any_unit() -> None:
    truth = {one.tokens: one.activations for one in (*TEST.positives, *TEST.negatives)}
    score, _ = simulate(Simulator(lambda tokens: Simulation(tuple(3 * y - 40 for y in truth[tuple(tokens)]))))
    assert pearson(score) == pytest.approx(1.0, abs=1e-12)


def test_each_judgement_is_one_window_with_its_label_decile_and_moments() -> None:
    score, by_window = simulate(Simulator(noisy))
    for place, one in enumerate(score.judgements):
        example = by_window[one.window]
        x, y = np.array(noisy(example.tokens).values), np.array(example.activations)
        assert one.item == place and one.label == (example.peak > 0) and one.decile == example.decile
        assert one.match is one.confidence is one.probability is one.reason is None and one.scored
        np.testing.assert_allclose(
            one.moments, [len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()], atol=1e-12
        )


def test_true_activations_are_the_excess_over_the_threshold() -> None:
    test = TestExamples((window(1, [3, 4], value=0.75),), (), (window(2),))
    score, _ = simulate(Simulator(lambda tokens: Simulation((1.0,) * len(tokens))), examples(test, theta=0.5))
    sums = {one.window: one.moments for one in score.judgements}
    assert sums == {1: (32, 32, 0.5, 32, 0.125, 0.5), 2: (32, 32, 0, 32, 0, 0)}


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0, 1e3)), min_size=1, max_size=50), st.randoms())
def test_moments_do_not_depend_on_the_order_of_tokens(pairs: list[tuple[float, float]], chance: object) -> None:
    once = moments([x for x, _ in pairs], [y for _, y in pairs])
    chance.shuffle(pairs)  # type: ignore[attr-defined]
    assert moments([x for x, _ in pairs], [y for _, y in pairs]) == once


def test_twenty_of_each_kind_by_default_spread_over_the_deciles() -> None:
    test = random_test(50, seed=3)
    score, _ = simulate(Simulator(noisy), examples(test))
    assert Counter(one.label for one in score.judgements) == {True: 20, False: 20}
    assert Counter(one.decile for one in score.judgements if one.label) == dict.fromkeys(range(10), 2)
    score, _ = simulate(Simulator(noisy), examples(test), create("scorers", "simulation", n_windows=None))
    assert len(score.judgements) == 100
    score, _ = simulate(Simulator(noisy), examples(test), create("scorers", "simulation", n_windows=3))
    assert len(score.judgements) == 6
    assert len({one.decile for one in score.judgements if one.label}) == 3
    with pytest.raises(BadConfig, match="n_windows of scorer 'simulation': expected at least 1, or null; seen 0"):
        SimulationScorer(0)


def test_few_windows_are_all_taken_and_none_are_no_judgements() -> None:
    test = TestExamples((window(1, [3]),), (), (window(2), window(3)))
    assert len(simulate(Simulator(noisy), examples(test))[0].judgements) == 3
    judge = Simulator(noisy)
    assert simulate(judge, examples(TestExamples((), (), ())))[0].judgements == () and judge.asked == []


def test_which_windows_and_their_order_come_from_the_seed_and_repeats_change_the_order_only() -> None:
    given = examples(TEST)
    backwards = replace(TEST, positives=TEST.positives[::-1], negatives=TEST.negatives[::-1])

    def order(one: ScoreExamples) -> list[int]:
        return [judgement.window for judgement in simulate(Simulator(noisy), one)[0].judgements]

    first = order(given)
    assert order(given) == order(replace(given, test=backwards)) == first
    assert set(order(replace(given, seed=1))) != set(first)
    assert set(order(replace(given, feature="8"))) != set(first)
    again = order(replace(given, repeat=1))
    assert set(again) == set(first) and again != first and order(replace(given, repeat=2)) not in (first, again)
    labels = [window < 30 for window in first]
    assert 0 < sum(labels[:20]) < 20  # not the positives first


@pytest.mark.parametrize(
    ("simulation", "reason"),
    [
        (Simulation(None, "no answer"), "no answer"),
        (Simulation(None), "the judge gave no prediction"),
        (Simulation((1.0,) * 31), "the judge gave 31 values for 32 tokens"),
        (Simulation(()), "the judge gave 0 values for 32 tokens"),
        (Simulation((math.nan,) + (0.0,) * 31), "a predicted activation is not a finite number"),
        (Simulation((math.inf,) * 32), "a predicted activation is not a finite number"),
        (Simulation((1e300,) * 32), "a predicted activation is not a finite number"),
    ],
)
def test_a_malformed_simulation_is_unscored_and_the_others_count(simulation: Simulation, reason: str) -> None:
    bad = TEST.positives[0].tokens
    given = examples(TestExamples(TEST.positives[:5], (), TEST.negatives[:5]))
    score, _ = simulate(Simulator(lambda tokens: simulation if tuple(tokens) == bad else noisy(tokens)), given)
    unscored = [one for one in score.judgements if not one.scored]
    assert [one.reason for one in unscored] == [reason] and score.n_unscored == 1
    assert unscored[0].window == TEST.positives[0].window and unscored[0].label and unscored[0].correct is None
    assert math.isfinite(pearson(score))


@pytest.mark.parametrize("delta", [-10, -1, 1])
def test_the_wrong_number_of_simulations_leaves_all_unscored(delta: int) -> None:
    class Wrong(Simulator):
        async def simulate(self, explanation: str, windows: Sequence[Sequence[str]]) -> Sequence[Simulation]:
            return [noisy(windows[0])] * (len(windows) + delta)

    given = examples(TestExamples(TEST.positives[:5], (), TEST.negatives[:5]))
    score, _ = simulate(Wrong(noisy), given)
    assert len(score.judgements) == score.n_unscored == 10
    assert {one.reason for one in score.judgements} == {f"the judge gave {10 + delta} simulations of 10 windows"}


def test_a_judge_gets_tokens_and_nothing_else() -> None:
    """The same tokens with labels and activations swapped are the same question."""
    given = examples(TEST)
    judge = Simulator(noisy)
    simulate(judge, given)
    assert set(judge.asked) <= {one.tokens for one in (*TEST.positives, *TEST.negatives)}
    flat = replace(
        TEST,
        positives=tuple(replace(one, activations=(0.5,) * 32) for one in TEST.positives),
        negatives=tuple(replace(one, activations=(0.25,) * 32) for one in TEST.negatives),
    )
    other = Simulator(noisy)
    simulate(other, replace(given, test=flat))
    assert other.asked == judge.asked
    assert list(SimulationScorer().items(given)) == []
