"""The ensemble: what candidates see, what they are held against, which one stays, and what it costs."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evalkit.errors import BadConfig, ClientDown, ClientError, ContextOverflow, NoAnswer, NotRecorded, RequestRefused
from evalkit.records import ExplainExamples, Explanation, Message, Response
from evalkit.registry import create
from explainers.ensemble import EnsembleExplainer
from explainers.validation import held_back, parse_verdicts, validation_prompt
from tests.support.explaining import EXAMPLES, window
from tests.support.paths import GOLDEN_PROMPTS as GOLDEN

# "whale" stands in every active window and in no other, "sea" in two of three active ones and in one of three others,
# "again" in all
POSITIVES = tuple(
    window(i, f"text{i} the whale {'in the sea' if i % 3 else 'was out'} again", whale=41.0 - i) for i in range(40)
)
NEGATIVES = tuple(window(100 + i, f"text{100 + i} {'some sea' if i % 3 == 0 else 'nothing'} again") for i in range(40))
BOTH = ExplainExamples("source", "7", 0.0, 41.0, POSITIVES, NEGATIVES)


class Model:
    """Writes the given candidates in turn, and says of each text whether it holds the description's last word."""

    name = "model"

    def __init__(self, *candidates: str | Exception) -> None:
        self.candidates = list(candidates)
        self.explained: list[tuple[list[str], int]] = []  # texts shown, seed
        self.validated: list[tuple[str, list[str], dict[str, Any]]] = []  # description, texts, options

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        question = messages[-1].content
        if "could not be read" in question:
            return Response("still no")
        texts = [json.loads(text) for text in re.findall(r'^\d+\. (".*")$', question, re.M)]
        if not question.startswith("Description: "):
            self.explained.append((texts, options["seed"]))
            found = self.candidates[(len(self.explained) - 1) % len(self.candidates)]
            if isinstance(found, Exception):
                raise found
            return Response(found if found.startswith("!") else json.dumps({"explanation": found}))
        description = json.loads(question.splitlines()[0].removeprefix("Description: "))
        self.validated.append((description, texts, options))
        return await self.judge(description, texts)

    async def judge(self, description: str, texts: list[str]) -> Response:
        return Response(json.dumps([int(description.split()[-1] in text.split()) for text in texts]))

    def score(self, word: str) -> float:
        """Balanced accuracy of a word on the windows that were asked about, from their texts alone."""
        texts = {text for description, asked, _ in self.validated for text in asked if description.split()[-1] == word}
        right = {True: [], False: []}  # type: dict[bool, list[bool]]
        for words in map(str.split, texts):
            right["whale" in words].append((word in words) == ("whale" in words))
        return float(np.mean([np.mean(each) for each in right.values()]))


def explain(model: Model, examples: ExplainExamples = BOTH, **options: Any) -> Explanation:
    return asyncio.run(EnsembleExplainer(**options).explain("7", examples, model))


def bare(text: str) -> str:
    return text.replace("<<", "").replace(">>", "")


def test_the_best_candidate_is_kept_and_the_note_says_every_score() -> None:
    model = Model("the sea", "it comes again", "a whale", "!no candidate at all")
    found = explain(model)
    assert (found.text, found.explainer, found.version) == ("a whale", "ensemble", "1-default-1")
    assert 0.3 < model.score("sea") < 1.0 and model.score("again") == 0.5 and model.score("whale") == 1.0
    assert found.note == (
        "candidate 3 of 4; balanced accuracy on 10 active and 10 inactive held-out windows: "
        f"{model.score('sea'):.2f}, 0.50, 1.00, no candidate"
    )


def test_no_candidate_sees_what_it_is_held_against() -> None:
    model = Model("one whale", "two whale", "three whale", "four whale")
    explain(model, of="contrastive", n_examples=100, n_negatives=100)
    shown = [[bare(text) for text in texts] for texts, _ in model.explained]
    asked = [text for description, texts, _ in model.validated if description == "one whale" for text in texts]
    assert len(asked) == len(set(asked)) == 20 and sum("whale" in text for text in asked) == 10
    assert all(not set(asked) & set(texts) for texts in shown)
    everything = {one.text for one in (*POSITIVES, *NEGATIVES)}
    for texts in shown:  # three quarters of the other 30 of each kind
        assert set(texts) < everything
        assert (sum("whale" in text for text in texts), len(texts)) == (22, 44)
        order = [int(re.match(r"text(\d+)", text)[1]) for text in texts]  # type: ignore[index]
        assert order == sorted(order)  # the strongest first, as in the pool
    assert len({tuple(texts) for texts in shown}) == 4 and len({seed for _, seed in model.explained}) == 4
    assert len(set().union(*shown)) == 60  # together they saw everything else


def test_windows_held_back_are_of_every_strength() -> None:
    held, rest = held_back(POSITIVES, 10, seed=3)
    assert [one.window // 4 for one in held] == list(range(10))
    assert sorted([*held, *rest], key=lambda one: one.window) == list(POSITIVES)
    assert [one.window for one in rest] == sorted(one.window for one in rest)
    assert held != held_back(POSITIVES, 10, seed=4)[0]
    assert held_back(POSITIVES[:3], 3, seed=0) == (list(POSITIVES[:3]), [])
    assert held_back(POSITIVES[:3], 0, seed=0) == ([], list(POSITIVES[:3]))
    chosen = [one.window for seed in range(400) for one in held_back(POSITIVES, 10, seed)[0]]
    counts = np.bincount(chosen, minlength=40)
    assert (abs(counts - 100) < 4.5 * np.sqrt(400 * 0.25 * 0.75)).all()  # each is one of four: within 4.5 SD


def test_both_labels_are_mixed_in_every_question_and_alike_for_all_candidates() -> None:
    model = Model("one whale", "two whale", "three whale", "four whale")
    explain(model)
    per_candidate = [
        [texts for description, texts, _ in model.validated if description == wanted]
        for wanted in ("one whale", "two whale", "three whale", "four whale")
    ]
    assert all(asked == per_candidate[0] for asked in per_candidate)
    assert [len(texts) for texts in per_candidate[0]] == [10, 10]
    ones = set()
    for feature in range(30):
        model = Model("a whale")
        asyncio.run(EnsembleExplainer(n=1).explain(str(feature), replace(BOTH, feature=str(feature)), model))
        ones.add(sum("whale" in text for text in model.validated[0][1]))
    assert len(ones) > 3  # how many fit is no constant that a model could learn


def test_the_first_of_equal_candidates_stays() -> None:
    assert explain(Model("again", "big whale", "small whale", "the whale")).text == "big whale"
    assert explain(Model("or again", "and again", "yet again", "still again")).text == "or again"


def test_equal_candidates_are_validated_once() -> None:
    model = Model("a whale", "the sea", "a whale", "the sea")
    found = explain(model)
    assert len(model.explained) == 4 and [description for description, _, _ in model.validated] == (
        ["a whale"] * 2 + ["the sea"] * 2
    )
    assert found.note.endswith(f"1.00, {model.score('sea'):.2f}, 1.00, {model.score('sea'):.2f}")


@pytest.mark.parametrize(
    ("options", "candidates", "questions"),
    [
        ({}, 4, 8),
        ({"n": 2}, 2, 4),
        ({"batch_size": 5}, 4, 16),
        ({"n_held": 3, "batch_size": 4}, 4, 8),
        ({"n": 1}, 1, 2),
    ],
)
def test_what_it_costs(options: dict[str, int], candidates: int, questions: int) -> None:
    """n candidates, and ⌈2 · n_held / batch_size⌉ questions for each different one."""
    model = Model(*(f"{word} whale" for word in ("one", "two", "three", "four")))
    explain(model, **options)
    assert (len(model.explained), len(model.validated)) == (candidates, questions)


def test_few_windows_hold_back_fewer() -> None:
    for positives, negatives, held in ((8, 40, 2), (40, 3, 2), (39, 40, 9), (4, 1, 1)):
        model = Model("a whale", "the sea")
        found = explain(model, replace(BOTH, positives=POSITIVES[:positives], negatives=NEGATIVES[:negatives]))
        assert f"on {held} active and {held} inactive held-out windows" in found.note


@pytest.mark.parametrize(
    ("positives", "negatives", "reason"),
    [
        (POSITIVES, (), "no inactive windows"),
        (POSITIVES[:3], NEGATIVES, "only 3 active windows"),
    ],
)
def test_where_nothing_can_be_held_back_the_first_stays_and_it_says_so(
    positives: Any, negatives: Any, reason: str
) -> None:
    examples = replace(BOTH, positives=positives, negatives=negatives)
    model = Model("the sea", "a whale")
    found = explain(model, examples)
    assert (found.text, found.note) == ("the sea", f"not validated: {reason}")
    assert model.validated == [] and len(model.explained) == 1
    assert [bare(text) for text in model.explained[0][0]] == [one.text for one in positives]  # all of them
    model = Model("!nothing", "a whale")
    assert explain(model, examples).text == "a whale" and len(model.explained) == 2
    with pytest.raises(ClientError, match="explanation of source feature 7: expected a JSON object"):
        explain(Model("!nothing"), examples)


def test_a_feature_without_any_candidate_fails() -> None:
    model = Model("!no", RequestRefused("prompt", expected="x", seen="y", fix="z"), "!nothing", "!at all")
    with pytest.raises(
        ClientError, match=r"explanation of source feature 7: expected a JSON object .*; seen 'still no'"
    ):
        explain(model)
    assert model.validated == []
    found = explain(Model("!no", RequestRefused("prompt", expected="x", seen="y", fix="z"), "a whale"))
    assert found.text == "a whale" and "candidate 3 of 4" in found.note


@pytest.mark.parametrize("kind", [ClientDown, NoAnswer, NotRecorded])
def test_what_passes_is_no_verdict_on_a_candidate(kind: type[ClientError]) -> None:
    """Else the choice would depend on the weather: a later run might have had that candidate."""
    error = kind("server", expected="x", seen="y", fix="z")
    with pytest.raises(kind):
        explain(Model("a whale", error, "the sea"))

    class Down(Model):
        async def judge(self, description: str, texts: list[str]) -> Response:
            raise error

    with pytest.raises(kind):
        explain(Down("a whale"))


class Moody(Model):
    """Cannot be read about one candidate, is refused about another, and about a third in half of the questions."""

    async def judge(self, description: str, texts: list[str]) -> Response:
        if description == "a mumbled whale":
            return Response("[1, 0]")
        if description == "a forbidden whale":
            raise RequestRefused("prompt", expected="x", seen="y", fix="z")
        if description == "half a whale" and texts == self.validated[0][1]:
            return Response("I cannot say.")
        return await super().judge(description, texts)


def test_what_is_not_read_is_neither_right_nor_wrong() -> None:
    model = Moody("a mumbled whale", "a forbidden whale", "half a whale", "the sea")
    found = explain(model)
    assert found.text == "half a whale"
    assert found.note.endswith(f"held-out windows: no score, no score, 1.00 (10 verdicts), {model.score('sea'):.2f}")
    assert explain(Moody("a mumbled whale", "a forbidden whale")).text == "a mumbled whale"  # none was read: the first


def test_a_short_context_is_asked_in_halves() -> None:
    class Narrow(Model):
        async def judge(self, description: str, texts: list[str]) -> Response:
            if len(texts) > 3:
                raise ContextOverflow("prompt", limit=100, needed=200, fix="x")
            return await super().judge(description, texts)

    model = Narrow("the sea", "a whale")
    whole = Model("the sea", "a whale")
    assert explain(model) == explain(whole)
    assert {len(texts) for _, texts, _ in model.validated} == {10, 5, 3, 2}


def test_order_and_delays_change_nothing() -> None:
    class Slow(Model):
        async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
            await asyncio.sleep(random.random() / 200)
            question = messages[-1].content
            if not question.startswith("Description: "):  # a candidate that depends on what is asked alone
                return Response(
                    json.dumps({"explanation": f"{options['seed'] % 7} {['sea', 'again'][len(question) % 2]}"})
                )
            return await super().generate(messages, **options)

    found = [explain(Slow("x"), seed=seed) for seed in (0, 0, 0, 1)]
    assert found[0] == found[1] == found[2] != found[3]


def test_thinking_has_room_and_seeds_go_to_the_client() -> None:
    model = Model("a whale")
    explain(model, thinking_tokens=500, n=1)
    assert [options["max_tokens"] for _, _, options in model.validated] == [556, 556]
    assert all(
        options["schema"]["minItems"] == options["schema"]["maxItems"] == 10 for _, _, options in model.validated
    )
    other = Model("a whale")
    explain(other, thinking_tokens=500, n=1, seed=1)
    assert model.explained[0][1] != other.explained[0][1]
    assert model.validated[0][2]["seed"] != other.validated[0][2]["seed"]


def test_other_explainers_and_their_options() -> None:
    made = create("explainers", "ensemble", of="cot", n=2, n_examples=3)
    assert made.version == "1-cot-1"
    model = Model("x")
    model.candidates = ['!{"observations": ["a"], "explanation": "a whale"}']
    assert asyncio.run(made.explain("7", BOTH, model)).text == "a whale"
    assert [len(texts) for texts, _ in model.explained] == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "words"}, "of of explainer 'ensemble': expected one of default, contrastive, cot; seen 'words'"),
        ({"n": 0}, "n of explainer 'ensemble': expected at least 1; seen 0"),
        ({"n_held": -1}, "n_held of explainer 'ensemble': expected at least 1; seen -1"),
        ({"batch_size": 0}, "batch_size of explainer 'ensemble': expected at least 1; seen 0"),
        ({"subset": 0.0}, "subset of explainer 'ensemble': expected a share above 0 and at most 1; seen 0.0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        EnsembleExplainer(**options)
    with pytest.raises(TypeError, match="no_such"):
        EnsembleExplainer(no_such=1)


def test_needs_a_client() -> None:
    with pytest.raises(BadConfig, match="explainer 'ensemble': expected a client that reaches a language model"):
        asyncio.run(EnsembleExplainer().explain("7", BOTH, None))


def test_it_chooses_as_well_as_twenty_answers_allow() -> None:
    """Candidates that tell a window rightly with known chance, against the choice by draws from binomials."""
    chances = (0.55, 0.65, 0.8, 0.7)

    class Noisy(Model):
        async def judge(self, description: str, texts: list[str]) -> Response:
            chance, feature = description.split()
            told = [random.Random(f"{chance} {feature} {text}").random() < float(chance) for text in texts]
            return Response(
                json.dumps([int(("whale" in text) == right) for text, right in zip(texts, told, strict=True)])
            )

    chosen = []
    for feature in range(150):
        model = Noisy(*(f"{chance} f{feature}" for chance in chances))
        named = replace(BOTH, feature=str(feature))
        chosen.append(float(asyncio.run(EnsembleExplainer().explain(named.feature, named, model)).text.split()[0]))
    rng = np.random.default_rng(0)
    scores = rng.binomial(20, chances, size=(200_000, 4))
    expected = np.array(chances)[scores.argmax(axis=1)]
    assert abs(np.mean(chosen) - expected.mean()) < 4 * expected.std() / np.sqrt(150)
    assert np.mean(chosen) > np.mean(chances) + 0.05


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 0, 1]", (True, False, True)),
        (" \n[1,0,\n 1]\n", (True, False, True)),
        ("```json\n[1, 0, 1]\n```", (True, False, True)),
        ("<think>[0, 0, 0]</think>[1, 0, 1]", (True, False, True)),
        ("[1, 0]", None),
        ("[1, 0, 1, 1]", None),
        ("[1, 0, 2]", None),
        ("[1, 0, 1.0]", None),
        ("[true, false, true]", None),
        ('["1", "0", "1"]', None),
        ("[1, 0, 1] or so", None),
        ("Text [1] fits", None),
        ("[[1, 0, 1]]", None),
        ('{"answer": [1, 0, 1]}', None),
        ("[1, 0, 1", None),
        ("[" + "9" * 5000 + ", 0, 1]", None),
        ("1, 0, 1", None),
        ("", None),
    ],
)
def test_what_counts_as_a_list(text: str, expected: tuple[bool, ...] | None) -> None:
    assert parse_verdicts(Response(text), 3) == expected


def test_golden_prompt() -> None:
    """A released prompt never changes: a difference here needs a new prompt version."""
    prompt = validation_prompt('words such as "whale"', [*EXAMPLES.positives, *EXAMPLES.negatives])
    shown = "\n".join(f"### {m.role}\n{m.content}\n" for m in prompt)
    assert shown == (GOLDEN / "ensemble-validation.txt").read_text(encoding="utf-8")
    answers = [message.content for message in prompt if message.role == "assistant"]
    assert "".join(answers).count("1") == "".join(answers).count("0")  # the shots say nothing about how many fit
