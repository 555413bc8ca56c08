"""The explainer that lets the model note first: the notes come before the phrase, bound it, and are not kept."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from evalkit.llm.clients.server.dialects import Dialect
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Response
from explainers.cot import SCHEMA, CotExplainer, cot_prompt, parse_conclusion
from tests.support.explaining import EXAMPLES, Scripted
from tests.support.paths import GOLDEN_PROMPTS as GOLDEN

NOTES = ["1: whale and sea are marked", "2: print, in a command", "2: secret too"]


def reply(**changes: Any) -> str:
    return json.dumps({"observations": NOTES, "explanation": "whales and commands"} | changes)


def test_of_notes_and_phrase_only_the_phrase_is_kept() -> None:
    client = Scripted(reply())
    found = asyncio.run(CotExplainer(thinking_tokens=1000).explain("7", EXAMPLES, client))
    assert found.text == "whales and commands"
    assert not any(note in f"{found.text}{found.note}" for note in NOTES)
    assert client.requests[0][1]["max_tokens"] == 1600


def test_the_notes_are_written_first_and_bounded() -> None:
    """Constrained decoding writes the fields in the order of the schema: it has to survive on its way to a server."""
    ask = GenerateRequest((), schema=SCHEMA, seed=0, max_tokens=600)
    sent = Dialect("json_schema").put(ask).body["response_format"]["json_schema"]["schema"]
    for schema in (SCHEMA, sent, Dialect("vllm").put(ask).extra["structured_outputs"]["json"]):
        assert list(schema["properties"]) == schema["required"] == ["observations", "explanation"]
    notes = SCHEMA["properties"]["observations"]  # type: ignore[index]
    longest = notes["maxItems"] * notes["items"]["maxLength"] + SCHEMA["properties"]["explanation"]["maxLength"]  # type: ignore[index]
    assert longest / 4 < 600  # characters per token of English: a reply of any allowed length has room


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (reply(), "whales and commands"),
        ("Here it is:\n```json\n" + reply(explanation=" whales\n") + "\n```", "whales"),
        (reply(observations=["one"]), "whales and commands"),
        (reply(observations=["n"] * 8), "whales and commands"),
        (reply(observations=["n"] * 9), None),
        (reply(observations=[]), None),
        (reply(observations=["one", " "]), None),
        (reply(observations=["one", 2]), None),
        (reply(observations="one"), None),
        (reply(observations=None), None),
        (reply(observations={"1": "one"}), None),
        (reply(explanation=""), None),
        (reply(explanation=NOTES), None),
        (reply(explanation="x" * 601), None),
        (reply(more="x"), None),
        ('{"explanation": "whales"}', None),
        (json.dumps({"observations": NOTES}), None),
        (reply()[:-20], None),
        (reply(observations=['{"observations": ["a"], "explanation": "b"}'])[:-20], None),
        (reply() * 2, None),
        ("", None),
    ],
)
def test_what_counts_as_a_conclusion(text: str, expected: str | None) -> None:
    assert parse_conclusion(Response(text)) == expected


def test_golden_prompt() -> None:
    """A released prompt never changes: a difference here needs a new prompt version."""
    prompt = cot_prompt(EXAMPLES, EXAMPLES.positives, EXAMPLES.negatives)
    shown = "\n".join(f"### {m.role}\n{m.content}\n" for m in prompt)
    assert shown == (GOLDEN / "explainer-cot.txt").read_text(encoding="utf-8")
