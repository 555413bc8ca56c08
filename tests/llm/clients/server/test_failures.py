"""What errors of servers mean, by the words that servers use."""

from __future__ import annotations

import email.utils
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalkit.errors import ClientDown, ContextOverflow, RequestRefused
from evalkit.llm.clients.server.failures import Refusal, Transient, judge_failure, retry_after
from evalkit.llm.clients.server.keys import Redactor

ALL = {"seed", "temperature", "logprobs", "top_logprobs", "response_format", "max_tokens", "system"}
SERVER = "http://here/v1"


def judged(status: int, body: Any, removable: set[str] = ALL, **headers: str) -> Any:
    """``body`` as the SDK has it: without the object around it."""
    said = SimpleNamespace(
        status_code=status, body=body, message=f"Error code: {status}", response=SimpleNamespace(headers=headers)
    )
    return judge_failure(said, SERVER, removable, Redactor("sk-secret", piece=8))


def told(message: str, **more: Any) -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_what_may_heal(status: int) -> None:
    failure = judged(status, told("busy"))
    assert isinstance(failure, Transient)
    assert (failure.reason, failure.wait_s, failure.silent) == (f"status {status}: busy", None, False)
    assert judged(status, told("busy"), **{"retry-after": "3"}).wait_s == 3


@pytest.mark.parametrize("status", [400, 413, 415, 418, 422])
def test_what_does_not(status: int) -> None:
    assert isinstance(judged(status, told("no")), RequestRefused)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (told("in an object"), "in an object"),
        ("just text", "just text"),
        ("<html>\n <h1>502</h1>", "<html> <h1>502</h1>"),
        ({"detail": "as some frameworks do"}, "as some frameworks do"),
        ({"detail": [{"loc": ["body", "x"], "msg": "bad", "input": "the prompt"}]}, "body.x: bad"),
        ([{"loc": ["body", 0], "msg": "bad"}, {"loc": None, "msg": "worse"}], "body.0: bad; : worse"),
        ({"odd": 1}, "{'odd': 1}"),
        (told(""), "invalid_request_error"),
        (None, "Error code: 418"),
        ([], "Error code: 418"),
        (told({"nested": "message"}), "{'nested': 'message'}"),  # type: ignore[arg-type]
    ],
)
def test_reasons_in_every_shape(body: Any, words: str) -> None:
    failure = judged(418, body)
    assert failure.seen.startswith("status 418: ") and words in failure.seen


def test_reasons_are_short_and_hold_no_key() -> None:
    for shift in range(60):  # wherever the reason is cut, the key was cut out before
        failure = judged(400, told("x" * (140 + shift) + "sk-secret" * 3 + "y" * 500))
        assert len(failure.seen) < 220 and "sk-sec" not in failure.seen
    assert judged(400, told("key sk-secre…")).seen == "status 400: key [key]…"


# contexts, in the words of servers as they are known

OVERFLOWS = [
    # vLLM, by version
    ("This model's maximum context length is 4096 tokens. However, you requested 5010 tokens (4910 in the messages, "
     "100 in the completion). Please reduce the length of the messages or completion.", 4096, 5010),
    ("This model's maximum context length is 2048 tokens. However, your request has 3000 input tokens. Please reduce "
     "the length of the input messages.", 2048, 3000),
    ("'max_tokens' or 'max_completion_tokens' is too large: 1000. This model's maximum context length is 4096 tokens and "
     "your request has 3500 input tokens (1000 > 4096 - 3500).", 4096, 4500),
    ("max_tokens=5000 cannot be greater than max_model_len=4096. (parameter=max_tokens, value=5000)", 4096, 5000),
    ("The decoder prompt (length 5000) is longer than the maximum model length of 4096. Make sure that `max_model_len` "
     "is no smaller than the number of text tokens.", 4096, 5000),
    # others
    ("This model's maximum context length is 128000 tokens. However, your messages resulted in 130,001 tokens.",
     128000, 130001),
    ("max_tokens is too large: 100000. This model supports at most 16384 completion tokens, whereas you provided 100000.",
     16384, 100000),
    ("prompt is too long: 210000 tokens > 200000 maximum", 200000, 210000),
    ("The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).", 1048576, 1200000),
    ("the request exceeds the available context size (4096 tokens), try increasing it: 5000 tokens", 4096, 5000),
    ("The input (5000 tokens) is longer than the model's context length (4096 tokens).", 4096, 5000),
    ("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens and 1000 "
     "`max_new_tokens`", 4096, None),
    ("maximum context length exceeded", None, None),
    ("maximum context length is 4096 tokens; request 1723456789012", 4096, None),  # no number of tokens
]  # fmt: skip


@pytest.mark.parametrize(("message", "limit", "needed"), OVERFLOWS, ids=lambda value: str(value)[:30])
def test_overflows_of_the_context(message: str, limit: int | None, needed: int | None) -> None:
    for status, param in ((400, None), (400, "messages"), (400, "max_tokens"), (422, None), (500, None)):
        failure = judged(status, told(message, param=param))
        assert isinstance(failure, ContextOverflow), (status, param)
        assert (failure.limit, failure.needed) == (limit, needed)
    assert isinstance(judged(429, told(message)), Transient)


def test_the_code_alone_is_enough() -> None:
    failure = judged(
        400, told("Please shorten it: your length is 9000, the limit is 8192", code="context_length_exceeded")
    )
    assert isinstance(failure, ContextOverflow) and (failure.limit, failure.needed) == (8192, 9000)


# parameters


@pytest.mark.parametrize(
    ("message", "param", "parameter"),
    [
        ("Unsupported parameter: 'seed' is not supported with this model.", "seed", "seed"),
        ("Unsupported value: 'temperature' does not support 0.0 with this model.", "temperature", "temperature"),
        ("Invalid schema for response_format 'reply': …", "response_format", "response_format"),
        ("unknown", "response_format.json_schema", "response_format"),
        ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "max_tokens", "max_tokens"),
        ("top_logprobs must be at most 5", "top_logprobs", "top_logprobs=5"),
        # named in words only
        ("This model does not support `logprobs`", None, "logprobs"),
        ("Unknown fields: top_logprobs, logprobs", None, "top_logprobs"),
        ("body.seed: Extra inputs are not permitted", None, "seed"),
        ("System role not supported", None, "system"),
        ("Developer instruction is not enabled for this model", None, "system"),
    ],
)
def test_parameters_that_can_be_left_out(message: str, param: str | None, parameter: str) -> None:
    failure = judged(400, told(message, param=param))
    assert isinstance(failure, Refusal) and failure.parameter == parameter
    assert failure.reason == f"status 400: {message}"
    assert not isinstance(judged(400, told(message, param=param), removable=set()), Refusal)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("max_tokens must be at least 16", "max_tokens"),  # another name for it would not help
        ("Invalid 'messages[1].content': mind your 'temperature'", "messages.[1].content"),
        ("unsupported: 'seed'", "messages"),
        ("rejected: the temperature of the seed …", None),  # what is said of parameters says that they do not fit
        ("Unsupported parameter: 'top_k'", "top_k"),
        ("Unsupported parameter: 'top_k' beside 'seed'", "top_k"),
        ("seeds and top_seed are not supported", None),
    ],
)
def test_what_is_wrong_with_one_request_alone(message: str, param: str | None) -> None:
    assert isinstance(judged(400, told(message, param=param)), RequestRefused)


def test_a_wrong_model_is_everybody_s() -> None:
    assert isinstance(judged(400, told("invalid model ID", param="model")), ClientDown)


@given(
    st.integers(400, 599),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=20),
        lambda inside: (
            st.lists(inside, max_size=3)
            | st.dictionaries(
                st.sampled_from(["message", "code", "type", "param", "detail", "msg", "loc"]), inside, max_size=5
            )
        ),
        max_leaves=8,
    ),
)
def test_whatever_a_server_says_means_something(status: int, body: Any) -> None:
    assert isinstance(judged(status, body), Transient | Refusal | ClientDown | ContextOverflow | RequestRefused)


# pauses


@given(st.text(max_size=30) | st.floats().map(str) | st.datetimes().map(email.utils.format_datetime))
def test_pauses_that_servers_ask_for_are_sound(value: str) -> None:
    seconds = retry_after({"retry-after": value})
    assert seconds is None or 0 <= seconds <= 300


def test_pauses_are_seconds_milliseconds_or_dates() -> None:
    assert retry_after({}) is None
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after-ms": "soon", "retry-after": "9"}) == 9
    for zone in ("GMT", "+0000"):
        date = email.utils.formatdate(time.time() + 30, usegmt=zone == "GMT")
        assert 28 < (retry_after({"retry-after": date}) or 0) < 31
    assert retry_after({"retry-after": email.utils.formatdate(time.time() - 30)}) == 0


@pytest.mark.parametrize(
    "words", ["maximum context length is {}", "max_model_len={}", "at most {}", "{} maximum", "{} > 4 - 9"]
)
def test_numbers_of_any_length_are_read_or_left(words: str) -> None:
    failure = judged(400, told(words.format("9" * 5000), code="context_length_exceeded"))
    assert isinstance(failure, ContextOverflow) and failure.limit is None
