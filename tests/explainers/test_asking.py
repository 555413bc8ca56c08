"""What explainers that ask a language model share: each of them is held to it, its prompt included."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from evalkit.errors import BadConfig, ClientError, ContextOverflow
from evalkit.markup import MARK_SHARE, parse
from evalkit.protocols import Explainer
from evalkit.records import ExplainExamples, Explanation, Message, Response
from explainers.asking import phrase, read_object, read_prompt
from explainers.contrastive import ContrastiveExplainer, contrastive_prompt
from explainers.cot import CotExplainer, cot_prompt, parse_conclusion
from explainers.default import DefaultExplainer, explain_prompt, parse_explanation
from tests.support.explaining import EXAMPLES, HOSTILE, Narrow, Scripted, window

PLAIN = '{"explanation": "whales"}'
NOTED = '{"observations": ["1: whale is marked", "2: print is"], "explanation": "whales"}'
Prompt = Callable[..., list[Message]]
ALL: list[tuple[type, str, Prompt]] = [
    (DefaultExplainer, PLAIN, explain_prompt),
    (ContrastiveExplainer, PLAIN, contrastive_prompt),
    (CotExplainer, NOTED, cot_prompt),
]
every = pytest.mark.parametrize(("explainer", "good", "prompt"), ALL, ids=[one.name for one, _, _ in ALL])


def explain(explainer: Explainer, client: Scripted, examples: ExplainExamples = EXAMPLES) -> Explanation:
    return asyncio.run(explainer.explain("7", examples, client))


@every
def test_a_good_reply_is_the_explanation(explainer: type, good: str, prompt: Prompt) -> None:
    client = Scripted(good)
    found = explain(explainer(), client)
    assert (found.source, found.feature, found.explainer, found.version) == ("source", "7", explainer.name, "1")
    assert (found.text, found.note) == ("whales", "")
    ((messages, options),) = client.requests
    assert (
        messages[-1] == prompt(EXAMPLES, EXAMPLES.positives, EXAMPLES.negatives if "con" in explainer.name else ())[-1]
    )
    assert options["schema"]["required"] == list(json.loads(good)) and options["max_tokens"] <= 600


@every
def test_what_cannot_be_read_is_asked_again_once_and_then_fails(explainer: type, good: str, prompt: Prompt) -> None:
    client = Scripted("Whales, I think.", good)
    assert explain(explainer(), client).text == "whales"
    first, second = (messages for messages, _ in client.requests)
    assert list(second[: len(first)]) == list(first) and second[-2] == Message("assistant", "Whales, I think.")
    assert second[-1].role == "user" and second[-1].content.startswith("That could not be read.")
    client = Scripted("Whales, I think.", good[:-4])
    with pytest.raises(
        ClientError, match=r"explanation of source feature 7: expected a JSON object .*; seen '\{\""
    ) as e:
        explain(explainer(), client)
    assert type(e.value) is ClientError and len(client.requests) == 2  # the feature fails, the run goes on


@every
def test_it_needs_a_client(explainer: type, good: str, prompt: Prompt) -> None:
    with pytest.raises(
        BadConfig, match=f"explainer '{explainer.name}': expected a client that reaches a language model"
    ):
        asyncio.run(explainer().explain("7", EXAMPLES, None))


@every
def test_seeds_depend_on_seed_source_and_feature_alone(explainer: type, good: str, prompt: Prompt) -> None:
    def seed(number: int, examples: ExplainExamples) -> int:
        client = Scripted(good)
        asyncio.run(explainer(seed=number).explain(examples.feature, examples, client))
        return int(client.requests[0][1]["seed"])

    others = [replace(EXAMPLES, source="other"), replace(EXAMPLES, feature="8")]
    assert seed(0, EXAMPLES) == seed(0, replace(EXAMPLES, positives=EXAMPLES.positives[:1]))
    assert len({seed(0, EXAMPLES), seed(1, EXAMPLES), *(seed(0, other) for other in others)}) == 4
    assert 0 <= seed(0, EXAMPLES) < 1 << 31


@every
def test_corpus_text_stays_data(explainer: type, good: str, prompt: Prompt) -> None:
    lines = prompt(EXAMPLES, EXAMPLES.positives, EXAMPLES.negatives)[-1].content.splitlines()
    assert len(lines) == 9  # no text has begun a line of its own
    texts = [parse(json.loads(line.split(". ", 1)[1])) for line in lines if line[:1].isdigit()]
    assert [text for text, _ in texts] == [EXAMPLES.positives[0].text, HOSTILE.text, EXAMPLES.negatives[0].text]
    assert [[text[a:b] for a, b in marks] for text, marks in texts] == [["whale", "sea"], ["print", "secret"], []]


@every
def test_where_the_context_is_short_the_weakest_examples_go(explainer: type, good: str, prompt: Prompt) -> None:
    positives = tuple(window(i, f"word{i} " + "and more " * 9, **{f"word{i}": 1.0 + i * 7 % 11}) for i in range(11))
    examples = ExplainExamples("source", "7", 0.0, 11.0, positives)
    client = Narrow(good)
    client.limit = sum(len(message.content) for message in prompt(examples, (), ())) // 4 + 200
    found = explain(explainer(), client, examples)
    content = client.requests[0][0][-1].content
    kept = [one for one in positives if f"<<word{one.window}>>" in content]
    assert 3 <= len(kept) < 11
    assert {one.peak for one in kept} == set(sorted((one.peak for one in positives), reverse=True)[: len(kept)])
    assert found.note.startswith(f"only {len(kept)} of 11 examples fit the context; the weakest were left out")
    client.limit -= 300
    with pytest.raises(ContextOverflow, match="use fewer examples"):
        explain(explainer(), client, examples)


@every
def test_the_shots_are_written_as_the_questions_are(explainer: type, good: str, prompt: Prompt) -> None:
    """Marks are where the levels put them, texts are JSON, and the answers are ones that would be accepted."""
    parsed = parse_conclusion if explainer is CotExplainer else parse_explanation
    shots = read_prompt(f"{explainer.name}_v1")["shots"]
    assert len(shots) >= 2
    for shot in shots:
        assert parsed(Response(shot["assistant"]))
        active, _, inactive = shot["user"].strip().partition("Not active:\n")
        assert active.startswith("Active:\n")
        numbers = []
        for number, text, told in re.findall(r'^(\d+)\. (".*")\n   levels: (.*)$', active, re.M):
            numbers.append(int(number))
            content, marks = parse(json.loads(text))
            pairs = re.findall(r'("[^"]*"|[\w\'’-]+) (\d+)(?:, |$)', told)
            assert ", ".join(f"{token} {level}" for token, level in pairs) == told
            top = max(int(level) for _, level in pairs)
            strong = [token.strip('"') for token, level in pairs if int(level) > MARK_SHARE * top]
            assert [content[a:b] for a, b in marks] == strong
            assert all(token.startswith('"') != bool(re.fullmatch(r"[\w'’-]+", token)) for token, _ in pairs)
        for number, text in re.findall(r'^(\d+)\. (".*")$', inactive, re.M):
            numbers.append(int(number))
            assert parse(json.loads(text))[1] == ()
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("whales", "whales"),
        ("  whales\n\tand\x0bthe\u2028sea ", "whales and the sea"),
        ("red \x1b[31m whale\x00s\x07", "red [31m whale s"),
        ("“naïve” 日本 😀", "“naïve” 日本 😀"),
        ("x" * 600, "x" * 600),
        ("x" * 601, None),
        (" x" * 700, None),
        ("half \ud83d", None),  # can be neither stored nor sent
        ("…!?", None),
        ("", None),
        (None, None),
        (7, None),
        (["whales"], None),
    ],
)
def test_what_a_phrase_is(value: Any, expected: str | None) -> None:
    assert phrase(value) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"a": 1, "b": [2]}', {"a": 1, "b": [2]}),
        ('so: ```json\n{"b": {"c": "}"}, "a": null}\n``` that is it', {"a": None, "b": {"c": "}"}}),
        ('<think>{"a": 0, "b": 0} no</think>{"a": 1, "b": 2}', {"a": 1, "b": 2}),
        ('{"a": 1, "a": 2, "b": 3}', None),  # one key twice
        ('{"a": 1, "b": {"c": 1, "c": 2}}', None),
        ('{"a": 1}', None),
        ('{"a": 1, "b": 2, "c": 3}', None),
        ('{"a": 1, "b": 2}{"a": 1, "b": 2}', None),
        ('{"a": 1, "b": 2', None),
        ('{"a": 1, "b": ' + "9" * 5000 + "}", None),  # Python refuses to read so long a number
        ('{"a":' * 1200, None),  # deeper than Python recurses
        ("[]", None),
        ("", None),
    ],
)
def test_what_an_object_is(reply: str, expected: dict[str, Any] | None) -> None:
    assert read_object(Response(reply), ("a", "b")) == expected


def test_prompts_of_explainers_are_those_of_their_version() -> None:
    """Every prompt file belongs to a version: ``NAME_vN.toml`` says "version N" at its top."""
    from importlib.resources import files

    names: Sequence[str] = [one.name for one in files("explainers").joinpath("prompts").iterdir()]
    assert {"default_v1.toml", "contrastive_v1.toml", "cot_v1.toml", "validation_v1.toml"} <= set(names)
    for name in names:
        found = re.fullmatch(r"[a-z_]+_v(\d+)\.toml", name)
        assert (
            found
            and f", version {found[1]}. Released: never edited"
            in (files("explainers").joinpath(f"prompts/{name}").read_text(encoding="utf-8").partition("\n")[0])
        )
