"""Detection: who is asked what, in which order, and what becomes of each answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from evalkit.records import Answer, JudgeItem, TestExamples
from scorers.detection import DetectionScorer
from scorers.fuzzing import FuzzingScorer
from tests.support.builders import EXPLANATION, OracleJudge, examples, random_test, window

TEST = random_test(20, seed=0)
CALIBRATION = random_test(20, seed=1, first=1000)


def number(text: str) -> int:
    return int(text.split("p")[0].strip().removeprefix("w"))


def detect(judge: OracleJudge, **options: object):  # type: ignore[no-untyped-def]
    return asyncio.run(DetectionScorer().score(EXPLANATION, examples(TEST, CALIBRATION, **options), judge))  # type: ignore[arg-type]


def fires(item: JudgeItem) -> bool:
    return number(item.text) % 1000 < 20  # the positives of both random tests


def test_a_perfect_judge_is_right_on_every_window() -> None:
    judge = OracleJudge(lambda item: Answer(fires(item), confidence=float(fires(item))))
    score = detect(judge)
    assert [judgement.correct for judgement in score.judgements] == [True] * 40
    assert sum(judgement.label for judgement in score.judgements) == 20
    assert (score.source, score.feature, score.scorer, score.cutoff) == ("source", "7", "detection", None)
    assert all(item.marks is None for item in judge.asked) and len(judge.asked) == 40
    assert [judgement.item for judgement in score.judgements] == list(range(40))


def test_windows_labels_and_deciles_belong_together() -> None:
    score = detect(OracleJudge(lambda item: Answer(True)))
    expected = {e.window: (True, e.decile) for e in TEST.positives} | {e.window: (False, None) for e in TEST.negatives}
    assert {j.window: (j.label, j.decile) for j in score.judgements} == expected


def test_order_is_shuffled_by_seed_and_by_nothing_else() -> None:
    def order(**options: object) -> list[int]:
        return [judgement.window for judgement in detect(OracleJudge(lambda item: Answer(True)), **options).judgements]

    assert order() == order()
    assert order() != order(seed=1)
    labels = [window < 20 for window in order()]
    assert 0 < sum(labels[:20]) < 20  # not the positives first
    backwards = replace(TEST, positives=TEST.positives[::-1], negatives=TEST.negatives[::-1])
    score = asyncio.run(
        DetectionScorer().score(EXPLANATION, examples(backwards, CALIBRATION), OracleJudge(lambda i: Answer(True)))
    )
    assert [judgement.window for judgement in score.judgements] == order()


def test_number_of_positives_in_a_prompt_varies() -> None:
    counts = set()
    for seed in range(5):
        labels = [j.label for j in detect(OracleJudge(lambda item: Answer(True)), seed=seed).judgements]
        counts |= {sum(labels[first : first + 5]) for first in range(0, 40, 5)}
    assert len(counts) >= 4


def test_a_cutoff_is_fitted_on_the_explain_pool_alone() -> None:
    # test and calibration confidences are apart by 10: a cut-off fitted on the test would be near 10.5
    judge = OracleJudge(
        lambda item: Answer(None, confidence=float(fires(item)) + (0 if number(item.text) >= 1000 else 10)), False
    )
    score = detect(judge)
    assert score.cutoff == 0.5
    assert all(judgement.match for judgement in score.judgements)
    assert len(judge.asked) == 80


def test_answers_with_a_match_need_no_cutoff() -> None:
    judge = OracleJudge(lambda item: Answer(False, confidence=0.2), probabilistic=False)
    assert detect(judge).cutoff is None and len(judge.asked) == 40


def test_without_calibration_confidences_stay_and_matches_are_unscored() -> None:
    judge = OracleJudge(lambda item: Answer(None, confidence=0.3), probabilistic=False)
    score = asyncio.run(DetectionScorer().score(EXPLANATION, examples(TEST), judge))
    assert score.n_unscored == 40 and {judgement.confidence for judgement in score.judgements} == {0.3}
    assert score.judgements[0].reason == "no match cut-off: the calibration windows lack one of the two labels"


def test_unscored_answers_keep_their_reason() -> None:
    judge = OracleJudge(lambda item: Answer(None, reason="the reply is no list") if fires(item) else Answer(False))
    score = detect(judge)
    assert {j.reason for j in score.judgements if j.label} == {"the reply is no list"}
    assert score.n_unscored == 20 and all(j.correct for j in score.judgements if not j.label)


@pytest.mark.parametrize("delta", [-40, -1, 1])
def test_a_judge_with_the_wrong_number_of_answers_is_unscored_not_raised(delta: int) -> None:
    class Wrong(OracleJudge):
        async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
            return [Answer(True)] * (len(items) + delta)

    score = detect(Wrong(lambda item: Answer(True)))
    assert len(score.judgements) == 40 == score.n_unscored
    assert score.judgements[0].reason == f"the judge gave {40 + delta} answers to 40 items"


@pytest.mark.parametrize("answer", [Answer(None), Answer(True, confidence=float("nan")), Answer(None, float("inf"))])
def test_an_answer_that_says_nothing_is_unscored(answer: Answer) -> None:
    score = detect(OracleJudge(lambda item: answer))
    assert score.n_unscored == 40 and all(j.reason for j in score.judgements)


@pytest.mark.parametrize("sizes", [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1), (3, 2, 7)])
def test_odd_sizes_give_as_many_judgements_as_items(sizes: tuple[int, int, int]) -> None:
    positives, decoys, negatives = sizes
    test = TestExamples(
        tuple(window(i, [3]) for i in range(positives)),
        tuple(window(50 + i, [3]) for i in range(decoys)),
        tuple(window(90 + i) for i in range(negatives)),
    )
    judge = OracleJudge(lambda item: Answer(None, confidence=1.0), probabilistic=False)
    score = asyncio.run(DetectionScorer().score(EXPLANATION, examples(test, test), judge))
    assert len(score.judgements) == positives + negatives
    score = asyncio.run(FuzzingScorer().score(EXPLANATION, examples(test, test), judge))
    assert len(score.judgements) == positives + decoys


def test_items_are_exactly_what_a_judge_is_asked() -> None:
    for scorer in (DetectionScorer(), FuzzingScorer()):
        judge = OracleJudge(lambda item: Answer(None, confidence=1.0), probabilistic=False)
        given = examples(TEST, CALIBRATION)
        asyncio.run(scorer.score(EXPLANATION, given, judge))
        assert list(scorer.items(given)) == judge.asked
