"""Simulations by the judges that ask no model: which tokens they light up, and with what."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from evalkit.records import Simulation
from evalkit.registry import create
from scorers.judges.embedding import EmbeddingJudge
from scorers.judges.minilm import Embedder
from scorers.simulation import SimulationScorer
from tests.support.word_features import SOURCE, make_examples

WINDOWS = [
    (" the", " wh", "ales", " swam", " under", "\n", " the", " ship", "."),
    ("def", " add", "(", "a", ",", " b", "):", "\n   ", " return"),
]


def simulated(judge: object, explanation: str, windows: Sequence[Sequence[str]] = WINDOWS) -> list[Simulation]:
    return list(asyncio.run(judge.simulate(explanation, windows)))  # type: ignore[attr-defined]


def test_the_lexical_judge_lights_up_the_tokens_of_what_is_named() -> None:
    judge = create("judges", "lexical")
    found = simulated(judge, "words such as whale, returning")
    assert [one.values for one in found] == [(0, 1, 1, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0, 0, 0, 1)]
    found = simulated(judge, 'the punctuation "," and "."')
    assert [one.values for one in found] == [(0, 0, 0, 0, 0, 0, 0, 0, 1), (0, 0, 0, 0, 1, 0, 0, 0, 0)]
    assert simulated(judge, "line breaks")[0].values == (0, 0, 0, 0, 0, 1, 0, 0, 0)
    assert simulated(judge, " ") == [Simulation(None, "the explanation is empty")] * 2
    assert simulated(judge, "whales", []) == []


@pytest.mark.slow
def test_the_embedding_judge_gives_a_token_the_similarity_of_its_word(minilm: Path) -> None:
    embedder = Embedder(str(minilm), "float32")

    def level(word: str) -> float:
        left, right = embedder.embed(embedder.token_ids([word, "animals of the sea"]))
        return max(0.0, float(left @ right)) ** 4

    judge = EmbeddingJudge(minilm, dtype="float32")
    first, second = simulated(judge, "animals of the sea")
    words = ["the", "whales", "whales", "swam", "under", None, "the", "ship", "."]
    assert first.values == pytest.approx([level(word) if word else 0.0 for word in words], abs=1e-3)
    assert first.values is not None and max(first.values) == first.values[1] == first.values[2]
    assert second.values is not None and len(second.values) == 9
    alone = EmbeddingJudge(minilm, dtype="float32", batch_size=16)
    assert simulated(alone, "animals of the sea", WINDOWS[1:]) == [second]
    assert simulated(judge, "") == [Simulation(None, "the explanation is empty")] * 2
    assert simulated(judge, "whales", [(), (" \n", "")]) == [Simulation(()), Simulation((0.0, 0.0))]


@pytest.mark.slow
def test_right_explanations_are_simulated_better_than_wrong_ones(minilm: Path) -> None:
    """Features of one word each in real text: the words' tokens stand out of a thousand others."""
    features = make_examples(6)[SOURCE]
    for judge in (EmbeddingJudge(minilm), create("judges", "lexical")):
        correlations: dict[bool, list[float]] = {True: [], False: []}
        for word, one in features.items():
            windows = SimulationScorer()._windows(one.score)
            true = np.concatenate([window.activations for window in windows])
            for other in list(features)[:3]:
                found = simulated(judge, f"the word {other}", [window.tokens for window in windows])
                predicted = np.concatenate([np.asarray(simulation.values) for simulation in found])
                varies = predicted.std() > 0
                correlations[word == other].append(float(np.corrcoef(predicted, true)[0, 1]) if varies else 0.0)
        assert np.mean(correlations[True]) > 0.7
        assert abs(np.mean(correlations[False])) < 0.1
