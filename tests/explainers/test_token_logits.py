"""The explainers of the output side: what they show a language model, what they write without one, when they refuse."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from evalkit.errors import BadConfig, ClientError, InputError
from evalkit.registry import create
from explainers.token_logits import PromotedExplainer, TokenLogitsExplainer, token_logits_prompt
from tests.support.explaining import EXAMPLES, Scripted
from tests.support.paths import GOLDEN_PROMPTS as GOLDEN

HOSTILE = (' "]\n\nIgnore', "<<", "\\", "\n\n", ' whales"', "日", "\u202e", "{")
BAKING = replace(EXAMPLES, promoted=(" bread", " cake", "bread", " Cake", "akery"))
GOOD = '{"explanation": "baking"}'


def named(promoted: tuple[str, ...], n_tokens: int = 10) -> str:
    explainer = PromotedExplainer(n_tokens)
    explanation = asyncio.run(explainer.explain("7", replace(EXAMPLES, promoted=promoted)))
    assert (explanation.source, explanation.feature) == ("source", "7")
    assert (explanation.explainer, explanation.version) == ("promoted", "1")
    return explanation.text


def test_the_model_sees_the_tokens_and_nothing_of_the_examples() -> None:
    client = Scripted(GOOD)
    explanation = asyncio.run(TokenLogitsExplainer(n_tokens=3).explain("7", BAKING, client))
    assert (explanation.explainer, explanation.version, explanation.text) == ("token-logits", "1", "baking")
    messages, options = client.requests[0]
    shown = "".join(message.content for message in messages)
    assert json.loads(messages[-1].content.splitlines()[0]) == [" bread", " cake", "bread"]
    assert not any(example.text in shown for example in (*EXAMPLES.positives, *EXAMPLES.negatives))
    assert options["schema"]["required"] == ["explanation"]


def test_what_the_examples_say_changes_no_request() -> None:
    requests = []
    for examples in (BAKING, replace(BAKING, positives=(), negatives=(), peak=1.0)):
        client = Scripted(GOOD)
        asyncio.run(TokenLogitsExplainer().explain("7", examples, client))
        requests += client.requests
    assert requests[0] == requests[1]


def test_hostile_tokens_stay_one_line_of_data() -> None:
    lines = token_logits_prompt(HOSTILE)[-1].content.splitlines()
    assert json.loads(lines[0]) == list(HOSTILE)
    assert lines[1:] == token_logits_prompt(("a",))[-1].content.splitlines()[1:]


def test_an_unreadable_reply_is_asked_for_once_more_and_then_fails() -> None:
    client = Scripted("bread, I think", GOOD)
    assert asyncio.run(TokenLogitsExplainer().explain("7", BAKING, client)).text == "baking"
    with pytest.raises(ClientError, match=r"explanation of source feature 7: expected a JSON object"):
        asyncio.run(TokenLogitsExplainer().explain("7", BAKING, Scripted("bread", "cake")))


def test_without_a_client_or_without_promoted_tokens() -> None:
    with pytest.raises(BadConfig, match="explainer 'token-logits': expected a client"):
        asyncio.run(TokenLogitsExplainer().explain("7", BAKING, None))
    message = "source feature 7: expected tokens that the feature's direction promotes; seen none: it has no direction"
    for explainer in (TokenLogitsExplainer(), PromotedExplainer()):
        with pytest.raises(InputError, match=message):
            asyncio.run(explainer.explain("7", EXAMPLES, Scripted(GOOD)))


@pytest.mark.parametrize(
    ("promoted", "text"),
    [
        ((" bread", " cake", "akery"), "tokens such as bread, cake, akery are predicted next"),
        ((" bread", "bread", " Bread", "BREAD"), "the token bread is predicted next"),
        (("\n", "\n\n", " and"), "tokens such as a line break, and are predicted next"),
        (("  ", "\t", ")."), 'tokens such as a space, a tab, ")." are predicted next'),
        ((' "x', "don't"), 'tokens such as "\\"x", don\'t are predicted next'),
    ],
)
def test_tokens_are_named(promoted: tuple[str, ...], text: str) -> None:
    assert named(promoted) == text


def test_only_the_strongest_are_named_and_on_one_line() -> None:
    assert named((" a", " A", " b", " c"), n_tokens=2) == "tokens such as a, b are predicted next"
    assert "\n" not in named(HOSTILE)


def test_they_are_registered_and_only_one_asks() -> None:
    assert create("explainers", "token-logits").uses_client
    assert not hasattr(create("explainers", "promoted"), "uses_client")


def test_golden_prompt() -> None:
    """A released prompt never changes: a difference here needs a new prompt version."""
    shown = "\n".join(f"### {m.role}\n{m.content}\n" for m in token_logits_prompt(BAKING.promoted))
    assert shown == (GOLDEN / "explainer-token-logits.txt").read_text(encoding="utf-8")
