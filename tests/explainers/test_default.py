"""The language-model explainer: its prompt, what it accepts as a reply, and what it does with the rest."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from evalkit.errors import BadConfig, ClientError, ContextOverflow
from evalkit.markup import parse
from evalkit.records import ExplainExamples, Response
from explainers.asking import spread
from explainers.default import DefaultExplainer, explain_prompt, parse_explanation
from tests.support.explaining import EXAMPLES, HOSTILE, Narrow, Scripted, window
from tests.support.paths import GOLDEN_PROMPTS as GOLDEN


def explain(*replies: str, **options: Any) -> tuple[str, Scripted]:
    client = Scripted(*replies)
    explanation = asyncio.run(DefaultExplainer(**options).explain("7", EXAMPLES, client))
    assert (explanation.explainer, explanation.version) == ("default", "1")
    return explanation.text, client


def test_a_good_reply() -> None:
    text, client = explain('{"explanation": "whales\\n and the sea"}')
    assert text == "whales and the sea"
    assert client.requests[0][1]["schema"]["required"] == ["explanation"]


def test_one_re_ask_and_then_a_failure_never_the_raw_text() -> None:
    assert explain("Whales, I think.", '{"explanation": "whales"}')[0] == "whales"
    with pytest.raises(ClientError, match=r"explanation of source feature 7: expected a JSON object .* seen 'no idea'"):
        explain("Whales, I think.", "no idea")


def test_a_draft_in_an_unfinished_thought_is_no_explanation() -> None:
    text, client = explain('<think>First idea: {"explanation": "dogs"}. But no', '{"explanation": "cats"}')
    assert text == "cats" and len(client.requests) == 2


def test_needs_a_client() -> None:
    with pytest.raises(
        BadConfig, match="explainer 'default': expected a client that reaches a language model; seen none"
    ):
        asyncio.run(DefaultExplainer().explain("7", EXAMPLES, None))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"explanation": "x"}', "x"),
        ('```json\n{"explanation": "x"}\n```', "x"),
        ('Sure: {"explanation": "braces { } inside"} done', "braces { } inside"),
        ('{"explanation": ""}', None),
        ('{"explanation": "…"}', None),
        ('{"explanation": ["x"]}', None),
        ('{"explanation": "x", "more": 1}', None),
        ('{"explanation": "x"} {"explanation": "y"}', None),
        ('{"explanation": "cut of', None),
        ('{"text": "x"}', None),
        ("words about x", None),
        ("", None),
        ("{" * 5000, None),
        (json.dumps({"explanation": "x" * 601}), None),
    ],
)
def test_what_counts_as_an_explanation(text: str, expected: str | None) -> None:
    assert parse_explanation(Response(text)) == expected


def test_corpus_text_stays_data() -> None:
    lines = explain_prompt(EXAMPLES, EXAMPLES.positives, EXAMPLES.negatives)[-1].content.splitlines()
    assert len(lines) == 9  # no text has begun a line of its own
    shown = [json.loads(line.split(". ", 1)[1]) for line in lines if line[:1].isdigit()]
    texts = [parse(text) for text in shown]
    assert [text for text, _ in texts] == [EXAMPLES.positives[0].text, HOSTILE.text, EXAMPLES.negatives[0].text]
    marked = [[text[a:b] for a, b in marks] for text, marks in texts]
    assert marked == [["whale", "sea"], ["print", "secret"], []]
    assert lines[2] == "   levels: whale 10, sea 4, again 1"


def test_seed_depends_on_the_feature_only() -> None:
    reply = '{"explanation": "x"}'
    seeds = [explain(reply, seed=seed)[1].requests[0][1]["seed"] for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_examples_are_spread_over_those_there_are() -> None:
    positives = tuple(window(i, f"word{i}", **{f"word{i}": 10.0 - i}) for i in range(10))
    examples = ExplainExamples("source", "7", 0.0, 10.0, positives)
    content = explain_prompt(examples, spread(examples.positives, 5))[-1].content
    assert [i for i in range(10) if f"<<word{i}>>" in content] == [0, 2, 4, 6, 8]


def test_where_the_context_is_short_the_weakest_examples_go_and_it_says_so() -> None:
    positives = tuple(window(i, f"word{i} " + "and more " * 9, **{f"word{i}": 1.0 + i * 7 % 11}) for i in range(11))
    examples = ExplainExamples("source", "7", 0.0, 11.0, positives)
    overhead = sum(len(message.content) for message in explain_prompt(examples, ())) // 4
    client = Narrow('{"explanation": "words"}')
    client.limit = overhead + 200
    explanation = asyncio.run(DefaultExplainer().explain("7", examples, client))
    content = client.requests[0][0][-1].content
    kept = [i for i in range(11) if f"<<word{i}>>" in content]
    peaks = sorted((positives[i].peak for i in range(11)), reverse=True)
    assert 3 <= len(kept) < 11 and kept == sorted(kept)
    assert sorted((positives[i].peak for i in kept), reverse=True) == peaks[: len(kept)]
    assert explanation.note == f"only {len(kept)} of 11 examples fit the context; the weakest were left out"
    client.limit = overhead - 100
    with pytest.raises(ContextOverflow, match="use fewer examples"):
        asyncio.run(DefaultExplainer().explain("7", examples, client))


def test_golden_prompt() -> None:
    """A released prompt never changes: a difference here needs a new prompt version."""
    prompt = explain_prompt(EXAMPLES, EXAMPLES.positives, EXAMPLES.negatives)
    shown = "\n".join(f"### {m.role}\n{m.content}\n" for m in prompt)
    assert shown == (GOLDEN / "explainer-default.txt").read_text(encoding="utf-8")
