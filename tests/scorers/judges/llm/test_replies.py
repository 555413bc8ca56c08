"""Judgements out = items in, for every batch size and every odd reply: what can be read is read, the rest has a reason."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from evalkit.records import Answer, JudgeItem, Message, Response
from scorers.detection import DetectionScorer
from scorers.judges.llm.judge import LlmJudge, list_prompt
from scorers.trials import Trial, hold_test
from tests.scorers.replies import FILES, meanings
from tests.scorers.replies.make_replies import FORMS, NOT_OF_ONE, NOT_OF_ONE_EITHER
from tests.support.builders import EXPLANATION, OracleJudge, examples, random_test

SIZES = range(1, 65)
SOME_SIZES = (1, 2, 3, 5, 6, 10, 64)
TRIALS = [Trial(number, number % 3 == 0, JudgeItem(f" w{number} is a word")) for number in range(2 * max(SIZES))]


class Stubborn:
    """A client that gives one reply to whatever it is asked, and counts how often it is asked."""

    name = "stubborn"

    def __init__(self, reply: str) -> None:
        self.reply, self.asked = Response(reply), 0

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        self.asked += 1
        return self.reply


async def check(reply: str, readings: dict[int, tuple[bool, ...]], size: int) -> None:
    """One full batch and a shorter one of three, or three of one text each."""
    trials = TRIALS[: size + min(3, 2 * size)]
    lengths = [len(trials[first : first + size]) for first in range(0, len(trials), size)]
    client = Stubborn(reply)
    score = await hold_test("detection", "1", EXPLANATION, LlmJudge(client, batch_size=size), trials, [])
    judgements = score.judgements
    assert [(j.item, j.window, j.label) for j in judgements] == [(i, t.window, t.label) for i, t in enumerate(trials)]
    expected = [answer for length in lengths for answer in readings.get(length, [None] * length)]
    assert [judgement.match for judgement in judgements] == expected, f"{reply[:80]!r} with batches of {size}"
    assert all((judgement.match is None) == bool(judgement.reason) for judgement in judgements)
    assert all((judgement.correct is None) == (judgement.match is None) for judgement in judgements)
    assert score.n_unscored == expected.count(None)
    assert client.asked == sum(1 if length in readings else 2 for length in lengths)


def check_all(replies: dict[str, dict[int, tuple[bool, ...]]], sizes: Sequence[int]) -> None:
    async def run() -> None:
        for reply, readings in replies.items():
            for size in sizes:
                await check(reply, readings, size)

    asyncio.run(run())


def test_every_reply_at_some_batch_sizes() -> None:
    check_all(meanings("by_hand.jsonl", "systematic.jsonl"), SOME_SIZES)


@pytest.mark.slow
def test_every_reply_at_every_batch_size() -> None:
    check_all(meanings("by_hand.jsonl", "systematic.jsonl"), SIZES)


@pytest.mark.slow
def test_huge_replies() -> None:
    check_all(meanings("huge.jsonl"), (1, 2, 5, 64))


def test_the_replies_are_all_there() -> None:
    assert len(meanings(*FILES)) > 800


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_of_the_right_answers_is_read_at_every_batch_size(kind: str) -> None:
    """The client knows the labels. Batches of one text are left out where a form is not read for them."""

    class Knowing:
        name = "knowing"

        def __init__(self, form: str) -> None:
            self.write = FORMS[kind][form]

        async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
            texts = [json.loads(line.split(". ", 1)[1]) for line in messages[-1].content.splitlines() if '. "' in line]
            return Response(self.write([int(int(text.split()[0][1:]) % 3 == 0) for text in texts]))

    for form in FORMS[kind]:
        alone = kind in NOT_OF_ONE or form in NOT_OF_ONE_EITHER
        for size in SIZES:
            trials = TRIALS[: 2 * size] if alone else TRIALS[: 2 * size + 1]
            judge = LlmJudge(Knowing(form), batch_size=size)
            score = asyncio.run(hold_test("detection", "1", EXPLANATION, judge, trials, []))
            if alone and size == 1:
                assert score.n_unscored == len(trials)
            else:
                assert all(judgement.correct for judgement in score.judgements)


@pytest.mark.parametrize("size", [1, 3, 5, 50])
def test_the_scorer_gets_one_judgement_a_window_whatever_the_judge_says(size: int) -> None:
    """Detection itself: the same windows, labels and order as with a judge that answers."""
    windows = examples(random_test(20, seed=0))
    for reply in ("[1, 0]", "", "[" * 10_000, "[1, 0, 1, 1, 0]"):
        judge = LlmJudge(Stubborn(reply), batch_size=size)
        score = asyncio.run(DetectionScorer().score(EXPLANATION, windows, judge))
        asked = OracleJudge(lambda item: Answer(True, confidence=1.0))
        same = asyncio.run(DetectionScorer().score(EXPLANATION, windows, asked))
        assert [(j.window, j.label) for j in score.judgements] == [(j.window, j.label) for j in same.judgements]
        assert len(score.judgements) == 40
        assert score.n_unscored == (0 if reply.count(",") == size - 1 == 4 else 40)


def test_a_reply_with_a_thought_is_read_after_it() -> None:
    check_all({"<think>[0, 0]</think>[1, 1]": {2: (True, True)}}, SIZES)


def test_a_bad_reply_is_no_part_of_the_second_question() -> None:
    seen: list[Sequence[Message]] = []

    class Long:
        name = "long"

        async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
            seen.append(messages)
            return Response("no list " * 100_000)

    asyncio.run(hold_test("detection", "1", EXPLANATION, LlmJudge(Long()), TRIALS[:5], []))
    first, again = (sum(len(message.content) for message in messages) for messages in seen)
    assert again - first < 100
    assert seen[0] == list_prompt(EXPLANATION.text, [trial.item for trial in TRIALS[:5] if trial.item])
