"""How requests are put to servers of either kind, and how replies are read back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalkit.llm.clients.server.dialects import Dialect, Form, MalformedReply, read_reply
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Message
from explainers.default import SCHEMA
from scorers.judges.llm.judge import list_schema

ASK = GenerateRequest([Message("system", "s"), Message("user", "u")], seed=7, max_tokens=10)
PLAIN = Form({"messages": [{"role": "user", "content": "u"}]}, {}, wrapped=False)


def completion(text: Any, **choice: Any) -> Any:
    """As the SDK builds it: attributes that are missing in the reply are missing here or None."""
    message = SimpleNamespace(content=text)
    usage = SimpleNamespace(prompt_tokens=3, completion_tokens=4)
    made = SimpleNamespace(message=message, logprobs=None, finish_reason="stop")
    made.__dict__.update(choice)
    return SimpleNamespace(choices=[made], usage=usage, model="m-1")


def logprobs(*tokens: dict[str, float]) -> Any:
    def one(token: str, logprob: Any) -> Any:
        return SimpleNamespace(token=token, logprob=logprob)

    made = []
    for candidates in tokens:
        ranked = [one(token, logprob) for token, logprob in candidates.items()]
        made.append(SimpleNamespace(token=ranked[0].token, logprob=ranked[0].logprob, top_logprobs=ranked))
    return SimpleNamespace(content=made)


# requests


def test_vllm_is_given_constraints_of_its_own() -> None:
    dialect = Dialect("vllm")
    for change, own in (
        ({"schema": list_schema(2)}, {"json": list_schema(2)}),
        ({"choices": ("yes", "no")}, {"choice": ["yes", "no"]}),
        ({"regex": "a+"}, {"regex": "a+"}),
    ):
        form = dialect.put(replace(ASK, **change))
        assert form.extra == {"structured_outputs": own} and not form.wrapped
        assert form.body["max_tokens"] == 10 and "response_format" not in form.body
    assert dialect.put(ASK).extra == {}


def test_others_are_given_an_object() -> None:
    dialect = Dialect("json_schema")
    typed = {**list_schema(2), "items": {"type": "integer", "enum": [0, 1]}}
    for change, inside in (
        ({"schema": list_schema(2)}, typed),
        ({"choices": ("yes", "no")}, {"type": "string", "enum": ["yes", "no"]}),
        ({"regex": "a+"}, {"type": "string", "pattern": "a+"}),
    ):
        form = dialect.put(replace(ASK, **change))
        schema = form.body["response_format"]["json_schema"]["schema"]
        assert form.body["response_format"]["json_schema"]["strict"] is True and form.wrapped and form.extra == {}
        (name,) = schema["properties"]
        assert schema == {
            "type": "object",
            "properties": {name: inside},
            "required": [name],
            "additionalProperties": False,
        }
        assert form.body["max_tokens"] > 10  # the object around the answer takes tokens too
        assert read_reply(ASK, form, completion(json.dumps({name: "x"}))).text in ("x", '"x"')


def test_an_object_goes_as_it_is() -> None:
    form = Dialect("json_schema").put(replace(ASK, schema=SCHEMA))
    assert form.body["response_format"]["json_schema"]["schema"] == SCHEMA
    assert not form.wrapped and form.body["max_tokens"] == 10
    assert read_reply(ASK, form, completion('{"answer": 1}')).text == '{"answer": 1}'


def test_strict_servers_find_a_type_at_every_enumeration() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"enum": ["x", "y"]},
            "b": {"type": "array", "items": {"anyOf": [{"enum": [True]}, {"enum": [0.5]}, {"enum": [1, "x"]}]}},
            "enum": {"type": "string"},
        },
    }
    form = Dialect("json_schema").put(replace(ASK, schema=schema))
    found = form.body["response_format"]["json_schema"]["schema"]["properties"]
    assert found["a"] == {"enum": ["x", "y"], "type": "string"}
    kinds = [one.get("type") for one in found["b"]["items"]["anyOf"]]
    assert kinds == ["boolean", "number", None]  # of several types: as it was
    assert found["enum"] == {"type": "string"}
    assert "type" not in schema["properties"]["a"]  # ours is another one


def test_probabilities_of_a_first_token_need_it_bare() -> None:
    form = Dialect("json_schema").put(replace(ASK, choices=("yes", "no"), logprobs=5, max_tokens=1))
    assert not form.wrapped and form.body["max_tokens"] == 1 and "response_format" not in form.body
    assert (form.body["logprobs"], form.body["top_logprobs"]) == (True, 5)


def test_no_constraints_where_there_are_none() -> None:
    form = Dialect("none").put(replace(ASK, schema=SCHEMA))
    assert set(form.body) == {"messages", "max_tokens", "temperature", "seed"} and form.extra == {}


def test_what_is_refused_is_left_out() -> None:
    dialect = Dialect("json_schema")
    asked = replace(ASK, choices=("yes", "no"))
    assert dialect.put(asked).removable == {"seed", "temperature", "response_format", "max_tokens", "system"}
    assert [dialect.refuse("seed"), dialect.refuse("seed")] == [True, False]
    assert "seed" not in dialect.put(asked).body
    dialect.refuse("max_tokens")
    body = dialect.put(asked).body
    assert body["max_completion_tokens"] > 10 and "max_tokens" not in body
    dialect.refuse("response_format")
    form = dialect.put(asked)
    assert not form.wrapped and form.body["max_completion_tokens"] == 10
    assert form.removable == {"temperature", "system"}
    dialect.refuse("system")
    assert dialect.put(asked).body["messages"] == [{"role": "user", "content": "s\n\nu"}]
    assert dialect.put(asked).removable == {"temperature"}


def test_log_probabilities_are_refused_with_their_number() -> None:
    dialect = Dialect("vllm", {"top_logprobs"})
    body = dialect.put(replace(ASK, logprobs=5)).body
    assert body["logprobs"] is True and "top_logprobs" not in body
    for refused in ({"logprobs"}, {"logprobs", "top_logprobs"}):
        assert not {"logprobs", "top_logprobs"} & set(Dialect("vllm", refused).put(replace(ASK, logprobs=5)).body)


def test_a_vllm_without_its_own_constraints_gets_the_others() -> None:
    dialect = Dialect("vllm")
    asked = replace(ASK, choices=("yes", "no"))
    assert dialect.put(asked).removable >= {"structured_outputs"}
    assert dialect.refuse("structured_outputs")
    form = dialect.put(asked)
    assert form.wrapped and form.extra == {} and "structured_outputs" not in form.removable


def test_a_reply_is_read_as_it_was_asked_for() -> None:
    """Though the server refused to be asked so in the meantime."""
    dialect = Dialect("json_schema")
    asked = replace(ASK, choices=("yes", "no"))
    form = dialect.put(asked)
    dialect.refuse("response_format")
    assert read_reply(asked, form, completion('{"answer": "yes"}')).text == "yes"
    assert read_reply(asked, dialect.put(asked), completion("yes")).text == "yes"


@given(st.text(), st.text())
def test_every_body_can_be_sent(system: str, content: str) -> None:
    asked = replace(ASK, messages=[Message("system", system + "\ud800"), Message("user", content + "\udfff")])
    sent = json.dumps(Dialect("vllm").put(asked).body, ensure_ascii=False).encode()
    assert [one["content"] for one in json.loads(sent)["messages"]] == [system + "?", content + "?"]


# replies


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ('{"answer": [0, 1]}', "[0, 1]"),
        (' {"answer":[0,1]} ', "[0, 1]"),
        ("[0, 1]", "[0, 1]"),
        ('{"answer": [0,', '{"answer": [0,'),
        ('{"other": 1}', '{"other": 1}'),
        ("null", "null"),
        ("no idea", "no idea"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_unwrapping_leaves_what_is_not_wrapped(text: str, read: str) -> None:
    asked = replace(ASK, schema=list_schema(2))
    form = Dialect("json_schema").put(asked)
    assert read_reply(asked, form, completion(text)).text == read


def test_a_reply_s_parts() -> None:
    response = read_reply(ASK, PLAIN, completion("hello", finish_reason="length"))
    assert (response.text, response.prompt_tokens, response.completion_tokens) == ("hello", 3, 4)
    assert (response.finish_reason, response.model, response.logprobs) == ("length", "m-1", ())


def test_log_probabilities_where_they_were_asked_for() -> None:
    told = logprobs({" yes": -0.1, "no": -2.5}, {"x": 0.0})
    asked = replace(ASK, logprobs=2)
    assert read_reply(asked, PLAIN, completion("yes", logprobs=told)).logprobs == ({" yes": -0.1, "no": -2.5}, {"x": 0})
    assert read_reply(ASK, PLAIN, completion("yes", logprobs=told)).logprobs == ()


def test_odd_log_probabilities() -> None:
    asked = replace(ASK, logprobs=2)

    def read(told: Any) -> Any:
        return read_reply(asked, PLAIN, completion("a", logprobs=told)).logprobs

    odd = logprobs({"a": -0.5, "b": -math.inf, "c": math.nan, "d": 0.3})
    odd.content[0].top_logprobs.append(SimpleNamespace(token="a", logprob=-7.0))  # other bytes, the same text
    assert read(odd) == ({"a": -0.5, "b": -math.inf, "d": 0.0},)
    bare = logprobs({"a": -0.5})
    bare.content[0].top_logprobs = []
    assert read(bare) == ({"a": -0.5},)
    for useless in (SimpleNamespace(content=None), SimpleNamespace(tokens=["a"]), SimpleNamespace(content=[5]), "x"):
        assert read(useless) == ()


def test_odd_numbers_of_tokens() -> None:
    for odd in (None, "7", -3, math.nan, math.inf, 10**400, {}):
        made = completion("a")
        made.usage = SimpleNamespace(prompt_tokens=odd, completion_tokens=2)
        assert read_reply(ASK, PLAIN, made).prompt_tokens == 0
    made.usage = None
    assert read_reply(ASK, PLAIN, made).completion_tokens == 0


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (None, "a reply without choices"),
        ("<html>", "a reply that is not JSON: '<html>'"),
        (SimpleNamespace(choices=[]), "a reply without choices"),
        (SimpleNamespace(choices=None, error={"message": "upstream"}), "without choices: .*upstream"),
        (SimpleNamespace(choices=[SimpleNamespace(message=None)]), "a reply without choices"),
        (completion(["part"]), "a reply whose content is not text but list"),
    ],
)
def test_what_is_no_reply(made: Any, words: str) -> None:
    with pytest.raises(MalformedReply, match=words):
        read_reply(ASK, PLAIN, made)


def test_a_log_probability_of_any_size_is_no_reason_to_fail() -> None:
    made = completion("a", logprobs=logprobs({"a": 10**400}))
    assert read_reply(replace(ASK, logprobs=2), PLAIN, made).logprobs == ()


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize(("content", "expected"), [("[1, 0]", "[1, 0]"), (None, ""), ("", "")])
def test_reasoning_in_a_field_of_its_own_stays_out_of_the_text(field: str, content: str | None, expected: str) -> None:
    reply = completion(content)
    setattr(reply.choices[0].message, field, "First idea: [1, 1]. No.")
    assert read_reply(ASK, PLAIN, reply).text == expected
