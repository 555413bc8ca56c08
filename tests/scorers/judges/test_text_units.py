"""Words and punctuation of a window, and the tokens that are part of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scorers.judges.text_units import spread, units


def test_words_keep_apostrophes_and_punctuation_stands_together() -> None:
    assert units('The captain\'s ship:: "sank" x_1') == (
        ("The", (0, 3)),
        ("captain's", (4, 13)),
        ("ship", (14, 18)),
        ("::", (18, 20)),
        ('"', (21, 22)),
        ("sank", (22, 26)),
        ('"', (26, 27)),
        ("x_1", (28, 31)),
    )
    assert units(" \n\t") == units("") == ()


@given(st.text(alphabet="ab' ’.,\n_é", max_size=30))
def test_units_cover_everything_but_white_space(text: str) -> None:
    covered = {place for _, (a, b) in units(text) for place in range(a, b)}
    assert covered == {place for place, character in enumerate(text) if not character.isspace()}
    assert all(text[a:b] == unit for unit, (a, b) in units(text))


def test_a_token_takes_the_largest_value_it_overlaps() -> None:
    tokens = (" the", " wh", "ale", "'s.", "\n", " sea")
    spans = [span for _, span in units("".join(tokens))]
    assert spread(tokens, spans, [1.0, 2.0, 3.0, 4.0]) == (1.0, 2.0, 2.0, 3.0, 0.0, 4.0)
    assert spread(tokens, spans, [1.0, 5.0, 3.0, 4.0]) == (1.0, 5.0, 5.0, 5.0, 0.0, 4.0)
    assert spread((), (), ()) == ()


def test_a_token_without_text_belongs_to_the_word_around_it() -> None:
    assert spread(("na", "ï", "", "ve", " ", "", "x"), [(0, 5), (6, 7)], [1.0, 2.0]) == (1, 1, 1, 1, 0, 0, 2)
