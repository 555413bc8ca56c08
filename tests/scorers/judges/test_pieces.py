"""The pieces of a window that compete."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scorers.judges.pieces import competing, pieces


def test_three_words_at_a_time() -> None:
    text = " The cat\n sat, down "
    assert [piece for piece, _ in pieces(text)] == ["The cat sat,", "cat sat, down"]
    assert [text[a:b] for _, (a, b) in pieces(text)] == ["The cat\n sat,", "cat\n sat, down"]


def test_few_words_and_none() -> None:
    assert pieces(" two words") == (("two words", (0, 10)),)
    assert pieces("a b c") == (("a b c", (0, 5)),)
    assert pieces(" \n") == (("", (0, 2)),)


def test_only_pieces_that_overlap_a_mark_compete() -> None:
    text = "a bb c dd e ff"
    assert competing(text, None) == ["a bb c", "bb c dd", "c dd e", "dd e ff"]
    assert competing(text, ((0, 1),)) == ["a bb c"]
    assert competing(text, ((3, 4),)) == ["a bb c", "bb c dd"]  # half of bb
    assert competing(text, ((0, 1), (12, 14))) == ["a bb c", "dd e ff"]
    assert competing(text, ((4, 5),)) == ["a bb c", "bb c dd"]  # the space between bb and c
    assert competing(text, ()) == []


def test_a_mark_on_white_space_at_an_end_lets_the_nearest_compete() -> None:
    text = "\n\na b c d\n"
    assert competing(text, ((0, 2),)) == ["a b c"]
    assert competing(text, ((9, 10),)) == ["b c d"]


@settings(deadline=None)
@given(st.text(alphabet="ab \n", min_size=1, max_size=30), st.data())
def test_every_non_empty_mark_has_a_piece(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    chosen = competing(text, ((start, end),))
    assert chosen and set(chosen) <= {piece for piece, _ in pieces(text)}
