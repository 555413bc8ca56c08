"""The contrastive explainer: which windows it shows, in which proportion where there is no room for all, its prompt."""

from __future__ import annotations

import asyncio

import pytest

from evalkit.records import ExplainExamples
from explainers.contrastive import ContrastiveExplainer, contrastive_prompt
from tests.support.explaining import EXAMPLES, Narrow, Scripted, window
from tests.support.paths import GOLDEN_PROMPTS as GOLDEN

REPLY = '{"explanation": "words"}'
POSITIVES = tuple(window(i, f"active{i} " + "and more " * 6, **{f"active{i}": 50.0 - i}) for i in range(40))
NEGATIVES = tuple(window(100 + i, f"silent{i} " + "and more " * 6) for i in range(30))
BOTH = ExplainExamples("source", "7", 0.0, 50.0, POSITIVES, NEGATIVES)


def shown(client: Scripted, word: str) -> list[int]:
    content = client.requests[-1][0][-1].content
    return [i for i in range(40) if f"{word}{i}>>" in content or f'"{word}{i} ' in content]


@pytest.mark.parametrize(
    ("options", "active", "silent"),
    [
        ({}, list(range(0, 40, 2)), [i * 30 // 20 for i in range(20)]),
        ({"n_examples": 4, "n_negatives": 3}, [0, 10, 20, 30], [0, 10, 20]),
        ({"n_negatives": 100}, list(range(0, 40, 2)), list(range(30))),
    ],
)
def test_both_kinds_are_spread_over_those_there_are(
    options: dict[str, int], active: list[int], silent: list[int]
) -> None:
    client = Scripted(REPLY)
    asyncio.run(ContrastiveExplainer(**options).explain("7", BOTH, client))
    assert shown(client, "active") == active and shown(client, "silent") == silent
    assert client.requests[0][1]["max_tokens"] == 200


def test_both_kinds_give_way_to_a_short_context_in_proportion() -> None:
    client = Narrow(REPLY)
    client.limit = sum(len(message.content) for message in contrastive_prompt(BOTH, (), ())) // 4 + 400
    found = asyncio.run(ContrastiveExplainer(n_negatives=10).explain("7", BOTH, client))
    active, silent = shown(client, "active"), shown(client, "silent")
    assert 2 <= len(active) < 20 and active == list(range(0, 2 * len(active), 2))  # the strongest of those chosen
    assert len(silent) == -(-len(active) // 2)
    assert found.note == f"only {len(active)} of 20 examples fit the context; the weakest were left out"


def test_without_inactive_windows_it_says_so() -> None:
    client = Scripted(REPLY)
    alone = ExplainExamples("source", "7", 0.0, 50.0, POSITIVES)
    assert asyncio.run(ContrastiveExplainer().explain("7", alone, client)).note == (
        "there were no inactive windows to show"
    )
    assert "Not active:" not in client.requests[0][0][-1].content


def test_golden_prompt() -> None:
    """A released prompt never changes: a difference here needs a new prompt version."""
    prompt = contrastive_prompt(EXAMPLES, EXAMPLES.positives, EXAMPLES.negatives)
    shown = "\n".join(f"### {m.role}\n{m.content}\n" for m in prompt)
    assert shown == (GOLDEN / "explainer-contrastive.txt").read_text(encoding="utf-8")
