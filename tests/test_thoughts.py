"""Every form in which reasoning models mark their thoughts, read by every part that asks a model."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalkit.records import JudgeItem, Response
from evalkit.thoughts import answer_after_thought, ends_in_thought, opens_thought
from explainers.default import DefaultExplainer
from scorers.judges.llm.judge import LlmJudge
from tests.support.explaining import EXAMPLES, Scripted

# the thought holds drafts of every kind of answer: none of them may be read
DRAFT = 'First idea: {"explanation": "dogs"}, or [1, 1], or 2, or [9, 9]. No.'
FORMS = {
    "think": ("<think>\n", "\n</think>\n\n"),
    "think, opened by the template": ("", "</think>"),
    "thinking": ("<thinking>", "</thinking>"),
    "reasoning": ("<reasoning>", "</reasoning>\n"),
    "Mistral": ("[THINK]", "[/THINK]"),
    "Mistral, opened by the template": ("", "[/THINK]"),
    "harmony": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "harmony, whole turn": (
        "<|start|>assistant<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "harmony, constrained": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>",
    ),
    "harmony without its special tokens": ("analysis", "assistantfinal"),
    "Seed": ("<seed:think>", "</seed:think>"),
    "Kimi": ("◁think▷", "◁/think▷"),
    "Gemma": ("<|channel>thought\n", "<channel|>"),
    "Cohere": ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    "OpenThinker": ("<|begin_of_thought|>", "<|end_of_thought|>\n\n<|begin_of_solution|>"),
}
CLOSERS = {"harmony": "<|return|>", "Cohere": "<|END_RESPONSE|>", "OpenThinker": "<|end_of_solution|>"}
form = pytest.mark.parametrize("form", FORMS)
ITEMS = [JudgeItem("a whale at sea"), JudgeItem("a dog on land")]


def thought(form: str, answer: str) -> str:
    opening, closing = FORMS[form]
    return f"{opening}{DRAFT}{closing}{answer}{CLOSERS.get(form, '')}"


@form
def test_an_explainer_reads_the_answer_behind_it(form: str) -> None:
    client = Scripted(thought(form, '{"explanation": "cats"}'))
    explanation = asyncio.run(DefaultExplainer().explain("7", EXAMPLES, client))
    assert explanation.text == "cats" and len(client.requests) == 1


@form
def test_a_judge_reads_the_list_behind_it(form: str) -> None:
    client = Scripted(thought(form, "[1, 0]"))
    answers = asyncio.run(LlmJudge(client, batch_size=2).judge("cats", ITEMS))
    assert [answer.match for answer in answers] == [True, False] and len(client.requests) == 1


@form
def test_a_judge_reads_the_word_behind_it(form: str) -> None:
    client = Scripted(thought(form, "yes"))
    (answer,) = asyncio.run(LlmJudge(client, "single", thinking_tokens=100).judge("cats", ITEMS[:1]))
    assert answer.match is True and len(client.requests) == 1


@form
def test_a_judge_reads_the_pick_behind_it(form: str) -> None:
    client = Scripted(thought(form, "3"))
    group = [*ITEMS, JudgeItem("a cat indoors")]
    (pick,) = asyncio.run(LlmJudge(client).pick([group]))
    assert pick.index == 2 and len(client.requests) == 1


@form
def test_a_judge_reads_the_levels_behind_it(form: str) -> None:
    client = Scripted(thought(form, "[3, 7]"))
    (simulation,) = asyncio.run(LlmJudge(client).simulate("cats", [("a", " cat")]))
    assert simulation.values == (3.0, 7.0) and len(client.requests) == 1


@pytest.mark.parametrize("form", [name for name, (opening, _) in FORMS.items() if opening and opening != "analysis"])
def test_a_thought_without_end_holds_no_answer(form: str) -> None:
    unfinished = FORMS[form][0] + DRAFT
    assert ends_in_thought(unfinished) and ends_in_thought(f"\n {unfinished}") and opens_thought(unfinished)
    client = Scripted(unfinished, '{"explanation": "cats"}')
    assert asyncio.run(DefaultExplainer().explain("7", EXAMPLES, client)).text == "cats"
    assert len(client.requests) == 2


@form
def test_an_answer_may_quote_the_marks(form: str) -> None:
    """A feature may fire on them: its explanation names them inside a JSON string."""
    for mark in filter(str.strip, FORMS[form]):
        answer = json.dumps({"explanation": f"the token {mark.strip()} and what follows"}, ensure_ascii=False)
        assert answer_after_thought(answer) == answer and not ends_in_thought(answer)
        assert answer_after_thought(thought("think", answer)).strip() == answer


@given(st.text())
def test_text_without_marks_is_unchanged(text: str) -> None:
    if not any(mark.strip() in text for pair in FORMS.values() for mark in pair if mark.strip()):
        assert answer_after_thought(text) == text


@given(st.sampled_from(sorted(FORMS)), st.text(alphabet=st.characters(blacklist_characters="<>[]◁▷|{}")))
def test_the_answer_is_what_stands_behind(form: str, answer: str) -> None:
    reply = Response(thought(form, answer))
    assert reply.answer.strip() == answer.strip() and not reply.in_thought


@pytest.mark.parametrize("piece", ['{"', "</think>", '{"a": "</think>"} ', '"</think>', "<think>", "{"])
def test_time_is_linear_in_the_length(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    answer_after_thought(text)
    ends_in_thought(text)
