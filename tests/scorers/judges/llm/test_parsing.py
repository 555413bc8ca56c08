"""Replies of language models, well-formed and not: the committed ones of ``tests/scorers/replies``, and made-up ones."""

from __future__ import annotations

import json
import math
import time
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scorers.judges.llm.parsing import Unparsable, parse_list, parse_yes_no, probability_of_yes
from tests.scorers.replies import FILES, FOLDER, Reply, read
from tests.scorers.replies.make_replies import FORMS, NOT_OF_ONE, NOT_OF_ONE_EITHER, lines

REPLIES = [reply for name in FILES for reply in read(name)]
KINDS = sorted({reply.kind for reply in REPLIES})
TIME_BOUND_S = 2.0  # of one reply; the slowest takes a tenth of it
PIECES = [
    *("[", "]", "1", "0", ",", " ", "\n", '"', "'", ".", "{", "}", ":", "-", "(", ")", "1.", "e0", "```json"),
    *("true", "False", "yes", "no", "<think>", "</think>", "Text", "answers", "is", "not", "e.g."),
    *("\u200b", "１", "，", "٠", "¹", "\x00", "\ud800", "🙂"),
]


def outcome(text: str, count: int) -> tuple[bool, ...] | None:
    """The answers; None where the reply cannot be read."""
    try:
        return parse_list(text, count)
    except Unparsable as error:
        assert str(error)
        return None


@pytest.mark.parametrize("kind", KINDS)
def test_each_reply_gets_what_it_must(kind: str) -> None:
    def shown(reply: Reply, got: tuple[bool, ...] | None) -> str:
        return f"{reply.text[:80]!r} for {reply.asked}: expected {reply.expected}, got {got}"

    wrong = []
    for reply in REPLIES:
        if reply.kind == kind:
            started = time.process_time()
            got = outcome(reply.text, reply.asked)
            assert time.process_time() - started < TIME_BOUND_S, f"{reply.text[:80]!r} takes too long"
            if got != reply.expected:
                wrong.append(shown(reply, got))
    assert not wrong, "\n".join(wrong)


def test_the_replies_are_many_and_of_both_outcomes() -> None:
    assert len({(reply.text, reply.asked) for reply in REPLIES}) == len(REPLIES) >= 900
    assert min(Counter(reply.expected is None for reply in REPLIES).values()) >= 250
    assert all(reply.expected is None or len(reply.expected) == reply.asked for reply in REPLIES)


@pytest.mark.parametrize("name", ["systematic.jsonl", "huge.jsonl"])
def test_the_generated_files_are_what_their_script_writes(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == lines(name)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1), max_size=80))
def test_every_json_list_of_answers_is_read(answers: list[int]) -> None:
    assert parse_list(json.dumps(answers), len(answers)) == tuple(answer == 1 for answer in answers)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=64), st.data())
def test_every_form_with_one_reading_is_read_at_every_length(answers: list[int], data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(FORMS)))
    name = data.draw(st.sampled_from(sorted(FORMS[kind])))
    got = outcome(FORMS[kind][name](answers), len(answers))
    if len(answers) == 1 and (kind in NOT_OF_ONE or name in NOT_OF_ONE_EITHER):
        assert got is None
    else:
        assert got == tuple(answer == 1 for answer in answers)


made_up = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=30).map(" ".join),
    st.tuples(st.sampled_from([r.text for r in REPLIES if len(r.text) < 200]), st.text(max_size=5)).map("".join),
)


@settings(deadline=None, max_examples=1500)
@given(made_up, st.integers(0, 6))
@example("[" * 5000 + "]" * 5000, 1)
@example("[" + "9" * 5000 + "]", 1)
def test_any_text_gives_exactly_the_answers_asked_for_or_a_reason(text: str, count: int) -> None:
    answers = outcome(text, count)
    assert answers is None or (len(answers) == count and all(isinstance(answer, bool) for answer in answers))


@settings(deadline=None, max_examples=500)
@given(made_up)
def test_no_text_is_read_as_lists_of_two_lengths(text: str) -> None:
    assert sum(outcome(text, count) is not None for count in range(8)) <= 1


@settings(deadline=None, max_examples=500)
@given(st.lists(st.integers(0, 1), min_size=2, max_size=6), st.integers(0, 5), st.data())
def test_one_odd_element_spoils_a_list(answers: list[int], place: int, data: st.DataObject) -> None:
    odd = data.draw(st.text(alphabet="23456789abcxyz?!-+/%", min_size=1, max_size=4))
    parts = [str(answer) for answer in answers]
    parts[place % len(parts)] = odd
    assert outcome(f"[{', '.join(parts)}]", len(answers)) is None


def test_reasons_are_exact() -> None:
    for text, count, reason in [
        ("[1]", 2, "1 answers instead of 2: '[1]'"),
        ("[maybe, 0]", 2, "'maybe' is neither 0 nor 1: '[maybe, 0]'"),
        ("I cannot say.", 2, "the reply contains no readable list: 'I cannot say.'"),
        ("[1, 0", 2, "the reply contains no readable list: '[1, 0'"),
        ("[1, 0] [0, 1]", 2, "the reply contains lists that differ: '[1, 0] [0, 1]'"),
        ("For example [1, 0]", 2, "the reply discusses a list instead of giving one: 'For example [1, 0]'"),
        ("<think>[1, 0]", 2, "the reply ends during the model's reasoning: '<think>[1, 0]'"),
        ("see [1]", 1, "the reply discusses a list instead of giving one: 'see [1]'"),
        ("Answer 3: [1]", 1, "the reply contains more than a list of one answer: 'Answer 3: [1]'"),
        ("x" * 200_000, 1, f"the reply is too long, 200000 characters: '{'x' * 77}…'"),
    ]:
        with pytest.raises(Unparsable) as error:
            parse_list(text, count)
        assert str(error.value) == reason


@pytest.mark.parametrize(("text", "expected"), [("yes", True), (" No.", False), ("YES\n", True), ('"no"', False)])
def test_yes_no(text: str, expected: bool) -> None:
    assert parse_yes_no(text) is expected


@pytest.mark.parametrize("text", ["", "yes, no", "yesterday", "not", "1", "y"])
def test_neither_yes_nor_no(text: str) -> None:
    with pytest.raises(Unparsable, match="neither yes nor no"):
        parse_yes_no(text)


def test_probability_of_yes() -> None:
    candidates = {"yes": math.log(0.3), " Yes": math.log(0.1), "no": math.log(0.1), "the": math.log(0.4)}
    assert probability_of_yes(candidates) == pytest.approx(0.8)
    assert probability_of_yes({"yes": math.log(0.2)}) is None  # "no" may have any part of the other 0.8
    assert probability_of_yes({"yes": math.log(0.99)}) == 1.0
    assert probability_of_yes({"yes": math.log(0.6), "Maybe": math.log(0.2)}) is None  # "no" may have 0.2 too
    assert probability_of_yes({"no": math.log(0.6), "Maybe": math.log(0.3), "Perhaps": math.log(0.001)}) == 0.0
    assert probability_of_yes({"Ġno": -0.1, "yes": -math.inf}) == 0.0
    assert probability_of_yes({"maybe": -0.1}) is None
    assert probability_of_yes({}) is None
