"""Fuzzing: true and false marks in windows that all hold the feature."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from evalkit.markup import marked_tokens, spans, token_spans
from evalkit.records import Answer, Example, JudgeItem, Score, TestExamples
from scorers.fuzzing import NO_ROOM, NOT_ACTIVE, FuzzingScorer
from tests.support.builders import EXPLANATION, OracleJudge, examples, random_test, window

TEST = random_test(30, seed=3)
BY_TEXT = {example.text: example for part in (TEST.positives, TEST.decoys) for example in part}


def fuzz(judge: OracleJudge, test: TestExamples = TEST, **options: object) -> Score:
    return asyncio.run(FuzzingScorer().score(EXPLANATION, examples(test, test, **options), judge))  # type: ignore[arg-type]


def truly_marked(item: JudgeItem) -> bool:
    example = BY_TEXT[item.text]
    return item.marks == spans(example.tokens, marked_tokens(example.activations, 0.0))


def test_positives_carry_true_marks_and_decoys_false_ones() -> None:
    judge = OracleJudge(lambda item: Answer(truly_marked(item)))
    score = fuzz(judge)
    assert [judgement.correct for judgement in score.judgements] == [True] * 60
    windows = {judgement.window: judgement.label for judgement in score.judgements}
    assert windows == {e.window: True for e in TEST.positives} | {e.window: False for e in TEST.decoys}
    assert all(judgement.decile is not None for judgement in score.judgements)


def test_marks_are_never_lost_and_match_in_number_and_length() -> None:
    judge = OracleJudge(lambda item: Answer(True))
    fuzz(judge)
    for item in judge.asked:
        example = BY_TEXT[item.text]
        true = spans(example.tokens, marked_tokens(example.activations, 0.0))
        assert item.marks and len(item.marks) == len(true)
        words = [sorted(item.text[a:b].count(" ") for a, b in marks) for marks in (item.marks, true)]
        assert words[0] == words[1]


def test_false_marks_touch_no_active_token() -> None:
    judge = OracleJudge(lambda item: Answer(True))
    fuzz(judge)
    for item in judge.asked:
        example = BY_TEXT[item.text]
        if truly_marked(item) or item.marks is None:
            continue
        for (a, b), value in zip(token_spans(example.tokens), example.activations, strict=True):
            assert value <= 0 or not any(start < b and a < end for start, end in item.marks)


def test_false_positions_differ_between_windows_but_not_between_runs() -> None:
    test = TestExamples(
        tuple(window(i, [i % 28 + 1]) for i in range(30)), tuple(window(50 + i, [i % 28 + 1]) for i in range(30)), ()
    )

    def placed(**options: object) -> dict[str, object]:
        judge = OracleJudge(lambda item: Answer(True))
        fuzz(judge, test, **options)
        return {item.text: item.marks for item in judge.asked}

    decoys = [example.text for example in test.decoys]
    # token texts have the same width in every window, so equal positions are equal spans
    assert len({placed()[text] for text in decoys}) > 12
    assert placed() == placed()
    assert placed() != placed(seed=1)


def test_a_judge_that_sees_only_positions_is_at_chance() -> None:
    """Best position rule: the likelihood ratio learned from 60 features, tested on 60 others."""
    counts = np.zeros((2, 32))
    held = []
    for feature in range(120):
        random = np.random.default_rng(feature)
        centre = int(random.integers(4, 26))  # each feature has its own favourite place
        test = random_test(10, seed=feature, starts=range(centre - 3, centre + 4))
        judge = OracleJudge(lambda item: Answer(True))
        score = fuzz(judge, test, seed=feature)
        asked = iter(judge.asked)
        for judgement in score.judgements:
            if judgement.reason:
                continue
            item = next(asked)
            start = item.text[: (item.marks or ((0, 0),))[0][0]].count(" ") - 1
            if feature < 60:
                counts[int(judgement.label), start - centre + 16 if 0 <= start - centre + 16 < 32 else 0] += 1
            else:
                held.append((judgement.label, start - centre + 16))
    ratio = np.log((counts[1] + 1) / (counts[0] + 1))
    right = [(ratio[place if 0 <= place < 32 else 0] > 0) == label for label, place in held]
    assert np.mean(right) < 0.62  # measured 0.57; placing marks uniformly gives 0.94


def test_windows_without_room_leave_both_halves_and_are_reported() -> None:
    crowded = range(0, 20)
    test = TestExamples(
        (window(0, [3]), window(1, crowded), window(2)), (window(10, [4]), window(11, crowded), window(12)), ()
    )
    judge = OracleJudge(lambda item: Answer(True))
    score = fuzz(judge, test)
    reasons = {judgement.window: judgement.reason for judgement in score.judgements}
    assert reasons == {0: None, 1: NO_ROOM, 2: NOT_ACTIVE, 10: None, 11: NO_ROOM, 12: NOT_ACTIVE}
    assert len(judge.asked) == 2 and score.n_unscored == 4


@pytest.mark.parametrize("theta", [0.0, 0.7])
def test_marks_follow_the_threshold(theta: float) -> None:
    tokens = tuple(f" t{i}" for i in range(12))
    values = (-0.1, 0.71, -0.1, 0.9, -0.1, 0.69, *[-0.1] * 6)
    example = Example(0, 0, tokens, values, decile=0)
    judge = OracleJudge(lambda item: Answer(True))
    fuzz(judge, TestExamples((example,), (), ()), theta=theta)
    assert judge.asked[0].marks is not None
    marked = {example.text[a:b] for a, b in judge.asked[0].marks}
    assert marked == ({"t3"} if theta else {"t1", "t3", "t5"})
