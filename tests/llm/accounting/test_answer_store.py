"""Requests as they are recorded: neither their text nor their keys may ever change."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalkit.llm.accounting.answer_store import KeyedRequest
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Message

HI = Message("user", "hi")
RECORDED = {  # by key: the model, the messages, the options and the text under which answers are recorded
    "99f6b157240196b9d4ffd6683f8d4c4056791a63": (
        "m",
        [HI],
        {"max_tokens": 5},
        '{"choices":null,"logprobs":0,"max_tokens":5,"messages":[{"content":"hi","role":"user"}],'
        '"model":"m","regex":null,"schema":null,"seed":null}',
    ),
    "60137ea2789e2c400c87fb776892184187bb188e": (
        "gpt;temperature=0.7",
        [Message("system", "é \u2028 \U0001f600"), Message("user", "\x00\n")],
        {
            "schema": {"type": "array", "items": {"enum": [True, 1.5, None]}},
            "logprobs": 5,
            "seed": 7,
            "max_tokens": 600,
        },
        '{"choices":null,"logprobs":5,"max_tokens":600,"messages":[{"content":"\\u00e9 \\u2028 \\ud83d\\ude00",'
        '"role":"system"},{"content":"\\u0000\\n","role":"user"}],"model":"gpt;temperature=0.7","regex":null,'
        '"schema":{"items":{"enum":[true,1.5,null]},"type":"array"},"seed":7}',
    ),
    "c69a5f35e1c3fb0f5e81182c04285793a67fc3be": (
        "m",
        [HI, Message("assistant", "a")],
        {"choices": ("yes", "no"), "max_tokens": 1},
        '{"choices":["yes","no"],"logprobs":0,"max_tokens":1,"messages":[{"content":"hi","role":"user"},'
        '{"content":"a","role":"assistant"}],"model":"m","regex":null,"schema":null,"seed":null}',
    ),
    "b26ca9a16ad0094116698a43b45815af548109df": (
        "m",
        [HI],
        {"regex": r"\d+\.?", "seed": 0, "max_tokens": 1},
        '{"choices":null,"logprobs":0,"max_tokens":1,"messages":[{"content":"hi","role":"user"}],'
        '"model":"m","regex":"\\\\d+\\\\.?","schema":null,"seed":0}',
    ),
}


@pytest.mark.parametrize("key", RECORDED)
def test_a_request_is_recorded_under_the_same_key_and_text_in_every_version(key: str) -> None:
    model, messages, options, text = RECORDED[key]
    assert KeyedRequest.of(model, GenerateRequest(messages, **options)) == KeyedRequest(key, model, text)


@pytest.mark.parametrize("key", RECORDED)
def test_the_recorded_text_is_the_request(key: str) -> None:
    model, messages, options, text = RECORDED[key]
    read = KeyedRequest(key, model, text).content()
    assert KeyedRequest.of(model, read).key == key
    choices: dict[str, Any] = {"choices": ["yes", "no"]} if "choices" in options else {}
    assert read == GenerateRequest(messages, **options | choices)


@settings(deadline=None)
@given(st.text(max_size=20), st.dictionaries(st.text(max_size=5), st.integers(), max_size=4))
def test_the_key_is_the_hash_of_canonical_json(content: str, schema: dict[str, int]) -> None:
    request = KeyedRequest.of("m", GenerateRequest([Message("user", content)], schema=schema, max_tokens=1))
    backwards = dict(reversed(list(schema.items())))
    again = KeyedRequest.of("m", GenerateRequest([Message("user", content)], schema=backwards, max_tokens=1))
    assert again == request
    assert json.loads(request.text)["messages"] == [{"role": "user", "content": content}]
