"""The embedding scorer, and the judge that takes windows whole, on the real MiniLM."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig
from evalkit.evaluate.components import make_tests
from evalkit.records import Answer, Example, Explanation, JudgeItem, Score, ScoreExamples, TestExamples
from evalkit.registry import create
from scorers.cutoff import fit_cutoff
from scorers.detection import DetectionScorer
from scorers.embedding import EmbeddingScorer
from scorers.judges.embedding import EmbeddingJudge
from scorers.judges.minilm import Embedder
from tests.support.builders import OracleJudge, examples, random_test

SEA = [
    "the schooner left harbour at dawn",
    "waves broke over the deck",
    "he sailed to the island",
    "the ship sank at last",
]
OTHER = [
    "boil the potatoes in salted water",
    "a guilty verdict came",
    "def add(a, b): return a + b",
    "page 12 of the report",
]


def windows(texts: Sequence[str], first: int, fires: bool) -> tuple[Example, ...]:
    made = []
    for number, text in enumerate(texts, first):
        tokens = tuple(f" {word}" for word in text.split())
        values = tuple(float(fires and place == 1) for place in range(len(tokens)))
        made.append(Example(number, number, tokens, values, decile=number % 10 if fires else None))
    return tuple(made)


def material() -> ScoreExamples:
    calibration_sea = ["a sailor on the pier", "the tide came in", "anchored off the coast", "the captain's cabin"]
    calibration_other = ["bread with butter", "the attorney objected", "import numpy", "seven hundred and two"]
    return examples(
        TestExamples(windows(SEA, 0, True), (), windows(OTHER, 100, False)),
        TestExamples(windows(calibration_sea, 200, True), (), windows(calibration_other, 300, False)),
    )


def scored(judge: EmbeddingJudge, text: str = "ships and the sea", given: ScoreExamples | None = None) -> Score:
    explanation = Explanation("source", "7", "hand", "1", text)
    return asyncio.run(EmbeddingScorer().score(explanation, given or material(), judge))


@pytest.mark.slow
def test_confidence_is_the_cosine_with_the_whole_window_and_the_cutoff_is_fitted_on_the_explain_pool(
    minilm: Path,
) -> None:
    result = scored(EmbeddingJudge(minilm, dtype="float32", pieces="whole"))
    embedder = Embedder(str(minilm), "float32")
    target = embedder.embed(embedder.token_ids(["ships and the sea"]))[0]

    def cosine(example: Example) -> float:
        return float(embedder.embed(embedder.token_ids([example.text]))[0] @ target)

    given = material()
    expected = {example.window: cosine(example) for example in (*given.test.positives, *given.test.negatives)}
    assert {judgement.window: judgement.confidence for judgement in result.judgements} == pytest.approx(
        expected, abs=1e-3
    )
    known = [(e, True) for e in given.calibration.positives] + [(e, False) for e in given.calibration.negatives]
    cutoff = fit_cutoff([cosine(e) for e, _ in known], [label for _, label in known])
    assert result.cutoff == pytest.approx(cutoff, abs=1e-3)
    for judgement in result.judgements:
        assert judgement.confidence is not None and result.cutoff is not None
        assert judgement.match == (judgement.confidence > result.cutoff)
    assert (result.scorer, result.version) == ("embedding", "1")


@pytest.mark.slow
def test_a_right_description_orders_windows_and_a_wrong_one_does_not(minilm: Path) -> None:
    judge = EmbeddingJudge(minilm, pieces="whole")

    def auroc(text: str) -> float:
        judged = [(j.confidence or 0.0, j.label) for j in scored(judge, text).judgements]
        return float(np.mean([a > b for a, one in judged if one for b, other in judged if not other]))

    assert auroc("ships and the sea") > 0.9
    assert auroc("cooking, law, programs and numbers") < 0.5


@pytest.mark.slow
def test_prepare_embeds_each_window_once_and_whole(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = Embedder._forward
    monkeypatch.setattr(Embedder, "_forward", lambda self, batch: rows.append(len(batch)) or forward(self, batch))
    judge, given = EmbeddingJudge(minilm, pieces="whole"), material()
    asyncio.run(judge.prepare(EmbeddingScorer().items(given), explanations=["ships and the sea"]))
    assert sum(rows) == 17  # sixteen windows and the explanation
    prepared = scored(judge)
    assert sum(rows) == 17 and prepared == scored(EmbeddingJudge(minilm, pieces="whole"))


@pytest.mark.slow
def test_order_and_batch_size_change_nothing(minilm: Path) -> None:
    given = material()
    test = given.test
    backwards = replace(given, test=replace(test, positives=test.positives[::-1], negatives=test.negatives[::-1]))
    expected = scored(EmbeddingJudge(minilm, pieces="whole"))
    assert scored(EmbeddingJudge(minilm, pieces="whole", batch_size=16), given=backwards) == expected


@pytest.mark.slow
def test_a_window_taken_whole_says_nothing_about_marks(minilm: Path) -> None:
    judge = EmbeddingJudge(minilm, pieces="whole")
    items = [JudgeItem("a whale", ((0, 1),)), JudgeItem("a whale"), JudgeItem(""), JudgeItem("a whale", ())]
    answers = asyncio.run(judge.judge("whales", items))
    assert [answer.reason for answer in answers] == [
        "marks are not supported with pieces=whole",
        None,
        "the text is empty",
        "marks are not supported with pieces=whole",
    ]
    best = asyncio.run(EmbeddingJudge(minilm).judge("whales", [JudgeItem("a whale")]))
    assert [answers[1]] == best  # of two words there is one piece: the whole
    assert {answer.reason for answer in asyncio.run(judge.judge(" ", items))} == {"the explanation is empty"}


def test_the_windows_are_detections() -> None:
    given = examples(random_test(12, seed=0), random_test(8, seed=1, first=1000))
    explanation = Explanation("source", "7", "hand", "1", "x")
    asked = []
    for scorer in (EmbeddingScorer(), DetectionScorer()):
        judge = OracleJudge(lambda item: Answer(None, confidence=float(len(item.text))), False)
        score = asyncio.run(scorer.score(explanation, given, judge))
        asked.append({(judgement.window, judgement.label) for judgement in score.judgements})
        assert len(asked[-1]) == 24 and len(judge.asked) == 40
        assert all(item.marks is None for item in judge.asked)
    assert asked[0] == asked[1]


def test_a_run_gives_it_a_judge_of_its_own_under_a_name_of_its_own(tmp_path: Path) -> None:
    """Whatever judges the run names; and the other scorers keep the judge that looks at pieces."""
    folder = tmp_path / "minilm"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    config = RunConfig(
        model="m", dictionaries=("d",), scorers=("detection", "embedding"), embedding_model=str(folder), controls=()
    )
    by_scorer = {test.scorer_name: test for test in make_tests(config, None)}
    assert {name: test.judge_name for name, test in by_scorer.items()} == {
        "detection": "embedding",
        "embedding": "embedding:pieces=whole",
    }
    assert {name: test.judge.pieces for name, test in by_scorer.items()} == {"detection": "best", "embedding": "whole"}  # type: ignore[attr-defined]


def test_the_option_is_checked() -> None:
    with pytest.raises(BadConfig, match="pieces of judge 'embedding': expected best or whole; seen 'all'"):
        create("judges", "embedding", pieces="all")
