"""Replies of language models, well-formed and not."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scorers.judges.parsing import Unparsable, parse_list, parse_yes_no, probability_of_yes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 0, 1]", (1, 0, 1)),
        (" [1,0,1]\n", (1, 0, 1)),
        ('["0"]', (0,)),  # a string zero is no, not a truthy string
        ('["1", "0"]', (1, 0)),
        ("[True]", (1,)),
        ("[true, False]", (1, 0)),
        ("[1.0, 0.0]", (1, 0)),
        ("['1', '0']", (1, 0)),
        ("```json\n[0, 1]\n```", (0, 1)),
        ('{"answers": [1]}', (1,)),
        ("The answers are [0, 0, 1].", (0, 0, 1)),
        ("[1, 1] because both match", (1, 1)),
        ("[]", ()),
    ],
)
def test_read(text: str, expected: tuple[int, ...]) -> None:
    assert parse_list(text, len(expected)) == tuple(bool(value) for value in expected)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 1),
        ("1, 0", 2),
        ("[1, 0]", 3),
        ("[1, 0, 1]", 2),
        ("[]", 1),
        ("[1, 0,]", 2),
        ("[1, , 0]", 3),
        ("[[1, 0]]", 2),
        ("[1, [0]]", 2),
        ("[1, 0] or [0, 1]", 2),
        ("]1, 0[", 2),
        ("[1 0]", 2),
        ("[2]", 1),
        ("[-1]", 1),
        ("[0.5, 1]", 2),
        ("[1e0]", 1),
        ("[NaN]", 1),
        ("[null]", 1),
        ("[１]", 1),  # a digit, but not one of ours
        ("[¹]", 1),
        ('["yes"]', 1),
        ("[\"1']", 1),
        ('[""]', 1),
        ("[01]", 1),
        ("[1, 0", 2),
        ("Text [1] does not match.", 1),  # a reference, not an answer
        ("[1] does not match", 1),
        ("see [1]", 1),
    ],
)
def test_not_read(text: str, count: int) -> None:
    with pytest.raises(Unparsable):
        parse_list(text, count)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1), max_size=12))
def test_every_json_list_of_answers_is_read(answers: list[int]) -> None:
    assert parse_list(json.dumps(answers), len(answers)) == tuple(answer == 1 for answer in answers)


@settings(deadline=None)
@given(st.text(alphabet="[]01,\"' \ntrueTrue.9{}", max_size=30), st.integers(0, 4))
def test_any_text_gives_all_answers_or_a_reason(text: str, count: int) -> None:
    try:
        answers = parse_list(text, count)
    except Unparsable as error:
        assert str(error)
    else:
        assert len(answers) == count and all(isinstance(answer, bool) for answer in answers)


def test_reasons_are_exact() -> None:
    with pytest.raises(Unparsable, match=r"^1 answers instead of 2: '\[1\]'$"):
        parse_list("[1]", 2)
    with pytest.raises(Unparsable, match=r"^'maybe' is neither 0 nor 1: '\[maybe, 0\]'$"):
        parse_list("[maybe, 0]", 2)


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
    assert probability_of_yes({"yes": math.log(0.2)}) == 1.0
    assert probability_of_yes({"Ġno": -0.1, "yes": -math.inf}) == 0.0
    assert probability_of_yes({"maybe": -0.1}) is None
    assert probability_of_yes({}) is None
