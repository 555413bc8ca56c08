"""What a sender's two ends say to each other survives the pipe."""

from __future__ import annotations

import math

import pytest

from evalkit import errors
from evalkit.errors import BadConfig, ContextOverflow, NoAnswer
from evalkit.llm.clients.sender.wire import (
    from_line,
    packed_error,
    packed_request,
    packed_response,
    to_line,
    unpacked_error,
    unpacked_request,
    unpacked_response,
)
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Message, Response


def test_a_request_keeps_its_key() -> None:
    messages = [Message("system", "line\nbreak \u2028 and \ud83d\ude00"), Message("user", "\x00")]
    request = GenerateRequest(messages, schema={"type": "object"}, logprobs=5, max_tokens=9)
    line = to_line(packed_request(request))
    assert line.count(b"\n") == 1
    found = unpacked_request(from_line(line))
    assert found.canonical_json("m") == request.canonical_json("m") and found.options() == request.options()


def test_a_reply_is_equal() -> None:
    response = Response("yes", ({"yes": -0.1, "no": -math.inf},), 3, 1, "length", "m")
    assert unpacked_response(from_line(to_line(packed_response(response)))) == response


@pytest.mark.parametrize(
    "name", [name for name in errors.__all__ if isinstance(getattr(errors, name), type) and name != "ContextOverflow"]
)
def test_every_error_is_itself_again(name: str) -> None:
    error = getattr(errors, name)("it", expected="a", seen="b", fix="c")
    again = unpacked_error(from_line(to_line(packed_error(error))))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


def test_a_context_overflow_keeps_its_numbers() -> None:
    again = unpacked_error(packed_error(ContextOverflow("it", limit=10, needed=None, fix="c")))
    assert isinstance(again, ContextOverflow) and (again.limit, again.needed) == (10, None)


def test_a_plug_in_s_own_kind_becomes_the_one_it_comes_from() -> None:
    class Busy(NoAnswer):
        def __init__(self, where: str) -> None:
            super().__init__(where, expected="a", seen="b", fix="c")
            self.connection = object()

    again = unpacked_error(from_line(to_line(packed_error(Busy("there")))))
    assert type(again) is NoAnswer and again.subject == "there"


def test_any_other_error_keeps_its_name_and_words() -> None:
    again = unpacked_error(packed_error(KeyError("choices")))
    assert not isinstance(again, BadConfig) and str(again) == "KeyError: 'choices'"
