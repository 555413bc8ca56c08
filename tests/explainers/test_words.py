"""The words explainer on hand-made windows whose right description is known."""

from __future__ import annotations

import asyncio

import pytest

from evalkit.errors import CorpusError
from evalkit.records import Example, ExplainExamples
from explainers.words import WordsExplainer
from tests.support.explaining import window


def explain(
    positives: list[Example], negatives: list[Example] | None = None, theta: float = 0.0, **options: int
) -> str:
    examples = ExplainExamples(
        "source", "7", theta, max(e.peak for e in positives), tuple(positives), tuple(negatives or ())
    )
    explanation = asyncio.run(WordsExplainer(**options).explain("7", examples, None))
    assert (explanation.source, explanation.feature, explanation.explainer) == ("source", "7", "words")
    return explanation.text


def test_names_the_words_by_weight() -> None:
    positives = [
        window(0, "the whale of the sea", whale=9.0, sea=4.0),
        window(1, "a whale and the sea", whale=8.0, sea=5.0),
        window(2, "the ship of the sea", ship=3.0),
    ]
    assert explain(positives) == "words such as whale, sea, ship"


def test_stop_words_beside_the_feature_fall_behind_without_a_list() -> None:
    positives = [window(i, f"the whale of the sea the end the {i}", the=1.0, whale=2.0) for i in range(4)]
    # "the" is as active as that everywhere here, so it is named; in the negatives and elsewhere it is silent
    negatives = [window(10 + i, "the dog and the cat and the cow and the hen") for i in range(10)]
    assert explain(positives).startswith("words such as the")
    assert explain(positives, negatives) == "words such as whale, the"
    # a feature of "the" itself: never silent on it
    assert explain([window(0, "the dog of the king", the=3.0)], [window(1, "a dog of my own")]) == "the word the"


def test_whole_words_not_token_fragments() -> None:
    tokens = (" un", "believ", "able", " story", ".")
    example = Example(0, 0, tokens, (0.0, 5.0, 0.0, 0.0, 0.0), decile=9)
    assert explain([example]) == "the word unbelievable"


def test_spellings_are_joined_and_the_commonest_is_shown() -> None:
    positives = [
        window(0, "The President and president", President=2.0, president=3.0),
        window(1, "President", President=2.0),
    ]
    assert explain(positives) == "the word President"


def test_punctuation_and_space_features_get_an_honest_text() -> None:
    assert explain([window(0, "red, green; blue", p1=4.0, p3=3.0)]) == 'the punctuation "," and ";"'
    breaks = Example(0, 0, ("end", ".", "\n\n", "Next"), (0.0, 0.0, 6.0, 0.0), decile=9)
    assert explain([breaks]) == "line breaks"
    spaces = Example(0, 0, ("x", "    ", "y"), (0.0, 6.0, 0.0), decile=9)
    assert explain([spaces]) == "runs of spaces"
    mixed = [window(0, "red, green", p1=4.0, red=3.0)]
    assert explain(mixed) == 'the punctuation ","; the word red'


def test_the_leading_space_of_a_token_is_not_what_it_fires_on() -> None:
    example = Example(0, 0, ("say", "\n  hello", " now"), (0.0, 5.0, 0.0), decile=9)
    assert explain([example]) == "the word hello"


def test_a_token_that_ends_one_word_and_starts_punctuation() -> None:
    example = Example(0, 0, ("call", " foo", "(),", " bar"), (0.0, 0.0, 5.0, 0.0), decile=9)
    assert explain([example]) == 'the punctuation "(),"'
    glued = Example(0, 0, (" x.y", " z"), (5.0, 0.0), decile=9)
    assert explain([glued]) == 'words such as x, y; the punctuation "."'


def test_marks_follow_the_threshold() -> None:
    high = window(0, "alpha beta gamma", alpha=0.72, beta=0.9, gamma=0.71)
    assert explain([high], theta=0.7) == "the word beta"


def test_n_words_n_examples_and_ties() -> None:
    even = window(0, "delta alpha charlie bravo", delta=1.0, alpha=1.0, charlie=1.0, bravo=1.0)
    assert explain([even]) == "words such as alpha, bravo, charlie, delta"
    assert explain([even], n_words=2) == "words such as alpha, bravo"
    strong, weak = window(0, "alpha", alpha=2.0), window(1, "bravo", bravo=1.0)
    assert explain([weak, strong], n_examples=1) == "the word alpha"


def test_order_of_windows_changes_nothing() -> None:
    positives = [
        window(i, f"whale number{i} in the sea", whale=3.0 + i, sea=2.0, **{f"number{i}": 2.0}) for i in range(8)
    ]
    assert explain(positives) == explain(positives[::-1])


def test_a_feature_that_never_fires_is_refused() -> None:
    with pytest.raises(CorpusError, match="source feature 7: expected a window with a token above the threshold 5"):
        explain([window(0, "whale", whale=3.0)], theta=5.0)
