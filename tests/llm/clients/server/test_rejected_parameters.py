"""A server rejects a parameter, in any words and with any status: it is left out from then on; the answers stay right."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from evalkit.llm.clients.openai import OpenAIClient
from evalkit.records import Answer, JudgeItem
from scorers.judges.llm.judge import LlmJudge
from tests.support.scripted import Reply, scripted

Body = dict[str, Any]
PROBABILITIES = (0.9, 0.6, 0.4, 0.1)  # of yes, for texts 0 to 3


def completion(content: Any, **choice: Any) -> Reply:
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    return 200, {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage,
        "choices": [{"index": 0, "finish_reason": "stop", "message": message, **choice}],
    }  # fmt: skip


def failure(message: str, param: str | None = None) -> Body:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}


def judged(reply: Callable[[Body], Reply], mode: str = "single", attempts: int = 2) -> tuple[list[Answer], list[Body]]:
    """The judge's answers about four texts, and the requests that the server got."""
    with scripted(reply, owned_by="another") as server:  # not vLLM, which is constrained in another way

        async def ask() -> list[Answer]:
            client = OpenAIClient("m", base_url=server.base_url, max_attempts=attempts)
            items = [JudgeItem(f"text number {number}", None) for number in range(4)]
            try:
                return list(await LlmJudge(client, mode).judge("whale", items))
            finally:
                await client.close()

        return asyncio.run(ask()), server.asked


def yes_or_no(body: Body, listed: int | None = None) -> Reply:
    """Says the likelier word, with ``listed`` of the two candidates, all if None."""
    yes = PROBABILITIES[int(re.search(r"text number (\d)", str(body["messages"]))[1])]  # type: ignore[index]
    both = sorted([("yes", yes), ("no", 1 - yes)], key=lambda pair: -pair[1])
    word, most = both[0]
    if not body.get("logprobs"):
        return completion(word)
    shown = both[: min(body.get("top_logprobs", 0), 2 if listed is None else listed)]
    token = {"token": word, "logprob": math.log(most), "bytes": None}
    tops = [{"token": name, "logprob": math.log(p), "bytes": None} for name, p in shown]
    return completion(word, logprobs={"content": [{**token, "top_logprobs": tops}]})


def in_a_list(body: Body) -> Reply:
    text = json.dumps([1, 0, 1, 0])
    return completion(json.dumps({"answer": [1, 0, 1, 0]}) if "response_format" in body else text)


@pytest.mark.parametrize("status", [400, 422, 403, 500])
@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("Invalid value for 'top_logprobs': must be less than or equal to 5.", "top_logprobs"),
        ("top_logprobs is invalid: the maximum is 5", None),
        ("Unsupported: top_logprobs, between 0 and 5", None),
        ("top_logprobs is not supported at this size", None),
    ],
)
def test_fewer_candidates_are_asked_for(status: int, message: str, param: str | None) -> None:
    """And what is known of the probabilities stays right."""
    found, asked = judged(
        lambda body: (status, failure(message, param)) if body.get("top_logprobs", 0) > 5 else yes_or_no(body)
    )
    assert [answer.probability for answer in found] == pytest.approx(PROBABILITIES)
    assert 1 <= asked[-1]["top_logprobs"] <= 5 and asked[-1]["logprobs"] is True


@pytest.mark.parametrize("listed", [0, 1])
def test_a_list_that_is_cut_short_gives_no_probability(listed: int) -> None:
    found, _ = judged(lambda body: yes_or_no(body, listed))
    assert [answer.match for answer in found] == [True, True, False, False]
    assert [answer.probability for answer in found] == [None] * 4


@pytest.mark.parametrize("status", [400, 403, 404, 422])
@pytest.mark.parametrize(
    "message",
    [
        "You are not allowed to request logprobs from this model",
        "logprobs is unavailable",
        "No endpoint supports the requested parameters",  # names none
        "This feature is for other plans",
    ],
)
def test_without_log_probabilities(status: int, message: str) -> None:
    found, asked = judged(lambda body: (status, failure(message)) if "logprobs" in body else yes_or_no(body))
    assert [answer.match for answer in found] == [True, True, False, False]
    assert [answer.probability for answer in found] == [None] * 4
    assert sum("logprobs" in body for body in asked) <= 4 + 3  # requests that were on their way, and the search


def test_a_busy_server_does_not_end_the_search() -> None:
    """A rate limit says nothing about the parameter that is left out at that moment: the search is made again."""
    busy = [(429, failure("slow down"))] * 2

    def reply(body: Body) -> Reply:
        if body["messages"][0]["role"] != "system" and busy:  # the first parameter that is suspected
            return busy.pop()
        return (400, failure("grammar backend missing")) if "response_format" in body else in_a_list(body)

    found, _ = judged(reply, "list", attempts=4)
    assert [answer.match for answer in found] == [True, False, True, False] and not busy


@pytest.mark.parametrize(
    "message",
    [
        "This response_format type is unavailable now",
        "json_schema: only json_object is accepted",
        "grammar backend missing",  # names nothing
    ],
)
def test_without_a_response_format(message: str) -> None:
    found, asked = judged(
        lambda body: (400, failure(message)) if "response_format" in body else in_a_list(body), "list"
    )
    assert [answer.match for answer in found] == [True, False, True, False]
    assert "response_format" in asked[0] and "response_format" not in asked[-1]


@pytest.mark.parametrize("status", [400, 422, 500])
@pytest.mark.parametrize(
    "message",
    [
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "Only user and assistant roles are supported!",
        "After the first message roles must alternate",
        "System role not supported",
    ],
)
def test_a_system_message_moves_into_the_first_user_message(status: int, message: str) -> None:
    found, asked = judged(
        lambda body: (status, failure(message)) if body["messages"][0]["role"] == "system" else in_a_list(body), "list"
    )
    assert [answer.match for answer in found] == [True, False, True, False]
    assert [sent["messages"][0]["role"] for sent in (asked[0], asked[-1])] == ["system", "user"]


def test_content_in_parts() -> None:
    def parts(body: Body) -> Reply:
        _, whole = in_a_list(body)
        thought = {"type": "thinking", "thinking": [{"type": "text", "text": "[0, 0, 0, 0]"}]}
        halves = (whole["choices"][0]["message"]["content"][:5], whole["choices"][0]["message"]["content"][5:])
        return completion([thought, *({"type": "text", "text": half} for half in halves)])

    found, _ = judged(parts, "list")
    assert [answer.match for answer in found] == [True, False, True, False]


def test_a_reply_that_ended_in_an_error_is_asked_for_again() -> None:
    left = [completion("", finish_reason="error")]
    found, asked = judged(lambda body: left.pop() if left else in_a_list(body), "list")
    assert [answer.match for answer in found] == [True, False, True, False] and len(asked) == 2
