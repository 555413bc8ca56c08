"""The lexical judge: what explanations name, what of it occurs in a text, and which text is the odd one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalkit.records import Answer, Example, ExplainExamples, JudgeItem, TestExamples
from evalkit.registry import create
from explainers.words import WordsExplainer
from scorers.detection import DetectionScorer
from scorers.fuzzing import FuzzingScorer
from scorers.judges.lexical import LexicalJudge
from scorers.judges.terms import Term, stem, terms
from tests.support.builders import EXPLANATION, examples


def judged(explanation: str, items: Sequence[JudgeItem]) -> list[Answer]:
    return list(asyncio.run(LexicalJudge().judge(explanation, items)))


def confidence(explanation: str, text: str, marks: tuple[tuple[int, int], ...] | None = None) -> float:
    answer = judged(explanation, [JudgeItem(text, marks)])[0]
    assert answer.match is None and answer.reason is None and answer.confidence is not None
    return answer.confidence


def named(explanation: str) -> list[str | None]:
    return [term.word or term.pattern for term in terms(explanation)]


@pytest.mark.parametrize(
    ("explanation", "expected"),
    [
        ("words such as whale, ship", ["whal", "ship"]),
        ("Words such as whale, ship", ["whal", "ship"]),
        ("the word the", ["the"]),
        ("words such as the, of, word", ["the", "of", "word"]),  # in a list every word counts
        ("the word don't", ["don't"]),
        ("the word tabs", ["tab"]),  # a word, not white space
        ("terms for ships at sea", ["ship", "sea"]),
        ("words such as sail, in stories of the sea", ["sail", "story", "sea"]),  # no mere list
        ('the punctuation ","', [","]),
        ('the punctuation "," and ";"', [",", ";"]),
        ('the punctuation ","; the word red', [",", "red"]),
        ('words such as x, y; the punctuation "."', ["x", "y", r"\."]),
        ("line breaks", [r"[\r\n]+"]),
        ("line breaks and tabs", [r"[\r\n]+", r"\t+"]),
        ("runs of spaces", [r"[^\S\r\n\t]{2,}"]),
        ("the word end; line breaks", ["end", r"[\r\n]+"]),
        ("newlines before headings", [r"[\r\n]+", "heading"]),
        ('the word "whale"', ["whal"]),
        ("the phrase ‘in the end’", [r"(?<!\w)in\s+the\s+end(?!\w)"]),
        ("mentions of “Moby Dick” or 'Ahab'", [r"(?<!\w)Moby\s+Dick(?!\w)", "ahab"]),
        ("calls of `sqlite3_open()`", ["call", r"(?<!\w)sqlite3_open\(\)"]),
        ("the captain's ships don't sail", ["captain", "ship", "don't", "sail"]),  # no quotes in here
        ("such as the", ["such", "as", "the"]),  # nothing but function words: better than nothing
        ("(!)", [r"\(!\)"]),
    ],
)  # fmt: skip
def test_what_an_explanation_names(explanation: str, expected: list[str]) -> None:
    assert named(explanation) == expected


@pytest.mark.parametrize("form", ['"', '."', '",', '","', '";', "'", "''", "`", "``", '"""', "\\", '" "', "<<", '"),'])
def test_every_form_of_punctuation_is_read_back_from_the_words_explainer(form: str) -> None:
    """Whatever the explainer puts between its quotes, alone and beside others."""
    for others in ([], [","], [";", ")"]):
        forms = [form.strip(), *others]
        text = "the punctuation " + " and ".join(f'"{one}"' for one in forms)
        found = [re.sub(r"\\(.)", r"\1", (term.pattern or "").replace(r"\s+", " ")) for term in terms(text)]
        assert found == forms
        assert confidence(f"{text}; the word red", f"a red b{form.strip()}c") > confidence(text, "a red b c")


def test_each_thing_is_named_once() -> None:
    assert terms("words such as shark, Sharks, ship") == (Term("shark"), Term("ship"))


@pytest.mark.parametrize(
    ("forms", "others"),
    [
        (["whale", "Whales", "WHALE's", "whale’s"], ["whaler"]),
        (["handle", "handles", "handling", "handled"], ["hand"]),
        (["walk", "walked", "walking", "walks"], ["wall"]),
        (["city", "cities"], ["cite"]),
        (["carry", "carries", "carried"], ["car"]),
        (["string", "strings"], ["str"]),  # a stem has a vowel
        (["this"], ["thi"]),  # function words are left alone
        (["class"], ["clas"]),
        (["sing", "sings"], ["s"]),
        (["box", "boxes"], ["boxe"]),
        (["church", "churches"], ["churn"]),
        (["note", "notes"], ["not"]),
        (["here"], ["her"]),
        (["Straße", "STRASSE"], ["Strasbourg"]),
    ],
)
def test_stems(forms: list[str], others: list[str]) -> None:
    assert len({stem(form) for form in forms}) == 1
    assert not {stem(form) for form in forms} & {stem(other) for other in others}


def test_confidence_is_the_share_of_what_is_named() -> None:
    """By hand: weights 1, 1/√2, 1/√3; one occurrence counts 1/2, two 3/4."""
    explanation = "words such as whale, ship, sea"
    total = 1 + 2**-0.5 + 3**-0.5
    assert confidence(explanation, "nothing of the kind") == 0.0
    assert confidence(explanation, "a Whale") == pytest.approx(0.5 / total)
    assert confidence(explanation, "the sea, the SEAS") == pytest.approx(0.75 * 3**-0.5 / total)
    assert confidence(explanation, "whales by a ship at sea") == pytest.approx(0.5)


def test_it_ranks() -> None:
    texts = ["whale whale ship sea", "whale whale ship", "whale ship", "whale", "ship", "sea", "none"]
    ordered = [confidence("words such as whale, ship, sea", text) for text in texts]
    assert ordered == sorted(ordered, reverse=True) and len(set(ordered)) == len(texts)


def test_whole_words_only() -> None:
    assert confidence("the word whale", "whaler narwhale") == 0.0
    assert confidence("mentions of 'in the'", "begin the") == 0.0
    assert confidence("mentions of 'in the'", "put IN\n the box") > 0.0


@pytest.mark.parametrize(
    ("explanation", "text", "expected"),
    [
        ("line breaks", "a\n\nb\nc", 2),
        ("line breaks", "a b", 0),
        ("tabs", "a\tb  c", 1),
        ("runs of spaces", "a   b c  d", 2),
        ("runs of spaces", "a b\n\nc", 0),
        ('the punctuation ","', "a, b, c), d", 3),
        ('the punctuation "(),"', "f(), g()", 1),
        ('the punctuation ".*"', "a.b*c", 0),  # no regular expression of the corpus's making
    ],
)
def test_occurrences_of_punctuation_and_white_space(explanation: str, text: str, expected: int) -> None:
    assert confidence(explanation, text) == pytest.approx(1 - 0.5**expected)


def test_with_marks_only_what_overlaps_a_mark_competes() -> None:
    text = "the whale and the ship\n"
    place = text.index("ale")
    assert confidence("the word whale", text, ((place, place + 1),)) == 0.5  # part of the word is enough
    assert confidence("the word ship", text, ((place, place + 1),)) == 0.0
    assert confidence("the word the", text) == 0.75
    assert confidence("the word the", text, ((0, 3),)) == 0.5
    assert confidence("the word the", text, ((0, 3), (14, 17))) == 0.75
    assert confidence("line breaks", text, ((len(text) - 1, len(text)),)) == 0.5
    assert confidence("the word whale", text, ((3, 4),)) == 0.0  # the space before it only touches


def test_marks_are_places_in_the_text_as_it_is() -> None:
    """Case folding makes some texts longer; marks must not shift by that."""
    text = "ßßßß whale ship"
    start = text.index("whale")
    assert confidence("the word whale", text, ((start, start + 5),)) == 0.5
    assert confidence("the word ship", text, ((start, start + 5),)) == 0.0


def test_odd_items() -> None:
    items = [JudgeItem(""), JudgeItem(" \n"), JudgeItem("whale"), JudgeItem("a whale", ())]
    answers = judged("whales", items)
    assert [answer.reason for answer in answers] == ["the text is empty", None, None, "nothing is marked"]
    assert [answer.confidence for answer in answers] == [None, 0.0, 0.5, None]
    assert judged("whales", []) == []
    empty = judged(" \n", items)
    assert len(empty) == 4 and {answer.reason for answer in empty} == {"the explanation is empty"}


@settings(deadline=None, max_examples=300)
@given(
    st.text(alphabet="ab thewords'\"`;,.\n\t\0‘’“”<>()", max_size=40),
    st.lists(st.text(alphabet="ab the,.\n", max_size=20), max_size=4),
)
def test_every_explanation_gives_an_answer_a_text(explanation: str, texts: list[str]) -> None:
    items = [JudgeItem(text) for text in texts]
    answers = judged(explanation, items)
    assert len(answers) == len(items)
    for answer, text in zip(answers, texts, strict=True):
        assert (answer.confidence is None) == (not text or not explanation.strip())
        assert answer.confidence is None or 0 <= answer.confidence < 1
    assert [judged(explanation, [item])[0] for item in items[::-1]][::-1] == answers  # no other item matters


def test_it_needs_no_model_and_has_no_options() -> None:
    judge = create("judges", "lexical")
    assert (judge.name, judge.version, judge.probabilistic) == ("lexical", "1", False)
    assert not hasattr(judge, "uses_client")


VOCABULARY = ["harbour", "lamp", "seven", "court", "bread", "river", "the", "of", "and", "a", "in", "to", "was", "it"]


def planted(word: str, count: int, *, first: int, fires: bool) -> list[Example]:
    """Windows of random words; ``word`` is in those where the feature fires, and in no other."""
    made = []
    for number in range(first, first + count):
        random = np.random.default_rng(number)
        tokens = [f" {choice}" for choice in random.choice(VOCABULARY, size=16)]
        place = int(random.integers(16)) if fires else -1
        if fires:
            tokens[place] = f" {word}" if word.isalnum() else word
        values = tuple(float(position == place) for position in range(16))
        made.append(Example(number, number, tuple(tokens), values, decile=number % 10 if fires else None))
    return made


@pytest.mark.parametrize("word", ["whale", "The", ",", "\n\n", '."', "this"])
def test_planted_features_are_found_from_the_words_explainers_own_text(word: str) -> None:
    """End to end without a model: explain, judge, and hold against the labels, in detection and in fuzzing."""
    shown = planted(word, 20, first=0, fires=True)
    silent = [
        example for example in planted(word, 40, first=50, fires=False) if " the" not in example.tokens or word != "The"
    ]
    explanation = asyncio.run(
        WordsExplainer().explain("7", ExplainExamples("source", "7", 0.0, 1.0, tuple(shown), tuple(silent[:10])))
    )
    test = TestExamples(
        tuple(planted(word, 20, first=100, fires=True)), tuple(planted(word, 20, first=200, fires=True)), tuple(silent)
    )
    for scorer in (DetectionScorer(), FuzzingScorer()):
        score = asyncio.run(scorer.score(explanation, examples(test, test), LexicalJudge()))
        right = [judgement.correct for judgement in score.judgements if judgement.correct is not None]
        assert np.mean(right) > 0.95 and len(right) > 30, (scorer.name, explanation.text)
    shuffled = asyncio.run(DetectionScorer().score(EXPLANATION, examples(test, test), LexicalJudge()))
    assert {judgement.confidence for judgement in shuffled.judgements} <= {0.0, 0.5}


def picked(*groups: Sequence[str]) -> list[int | None]:
    made = asyncio.run(LexicalJudge().pick([[JudgeItem(text) for text in group] for group in groups]))
    return [pick.index for pick in made]


def test_the_odd_text_shares_fewest_words() -> None:
    whales = ["the whale swam", "a whale and ships", "whales, it seems", "of the Whale"]
    for place in range(5):
        texts = [*whales[:place], "the cat and a dog of it", *whales[place:]]
        assert picked(texts) == [place]


def test_common_words_and_punctuation_decide_only_where_other_words_do_not() -> None:
    assert picked(["red, sky; to", "blue, lake; to", "green, hill; to", "brown hat"]) == [3]
    assert picked(["and of the whale", "of the sea and whale", "the whale", "and of the hat"]) == [3]


def test_ties_go_to_the_first_and_small_groups_to_a_reason() -> None:
    assert picked(["one", "two", "three"], ["x y", "x y", "x y"], ["x y", "x", "z"]) == [0, 0, 2]
    picks = asyncio.run(
        LexicalJudge().pick([[JudgeItem("a"), JudgeItem("b")], [], [JudgeItem("")] * 3, [JudgeItem("a")] * 3])
    )
    reasons = ["fewer than 3 texts, so none is the odd one out"] * 2 + ["a text of the group is empty", None]
    assert [pick.reason for pick in picks] == reasons


def test_a_text_repeated_within_itself_counts_once() -> None:
    assert picked(["whale ship", "whale ship", "whale whale whale whale"]) == [2]
