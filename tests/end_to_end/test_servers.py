"""The stand-in server: that each fault looks on the wire as it should, and that the log tells what happened."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import http.client
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evalkit.markup import spans
from evalkit.records import Example, ExplainExamples, JudgeItem, Message
from explainers.default import SCHEMA, explain_prompt
from scorers.judges.llm.judge import list_prompt, list_schema, single_prompt
from tests.support.servers import KINDS, ChatServer

WHALES = [JudgeItem("a whale swam by"), JudgeItem("the bakery was shut"), JudgeItem("two Whale bones")]


def body(messages: list[Message], **options: Any) -> dict[str, Any]:
    chat = [{"role": message.role, "content": message.content} for message in messages]
    return {"model": "stand-in", "messages": chat, "max_tokens": 60, **options}


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}}


LIST = body(list_prompt("words such as whale", WHALES), **of_schema(list_schema(3)))


def post(server: ChatServer, asked: dict[str, Any], key: str | None = None) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        connection.request("POST", "/v1/chat/completions", json.dumps(asked), headers)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def text_of(answered: tuple[int, dict[str, str], bytes]) -> str:
    status, _, content = answered
    assert status == 200
    return json.loads(content)["choices"][0]["message"]["content"]


def open_request(server: ChatServer, asked: dict[str, Any] = LIST) -> socket.socket:
    """A connection on which a whole request was sent and nothing read yet."""
    content = json.dumps(asked).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def eventually(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def always(kind: str, **options: Any) -> ChatServer:
    return ChatServer(faults=1.0, kinds=(kind,), **options)


# what the model says


def test_it_judges_by_shared_words() -> None:
    wrapped = {"type": "object", "properties": {"answer": list_schema(3)}, "required": ["answer"]}
    with ChatServer() as server:
        assert json.loads(text_of(post(server, LIST))) == [1, 0, 1]
        own = body(list_prompt("words such as whale", WHALES), structured_outputs={"json": list_schema(3)})
        assert json.loads(text_of(post(server, own))) == [1, 0, 1]
        assert json.loads(text_of(post(server, {**LIST, **of_schema(wrapped)}))) == {"answer": [1, 0, 1]}
        assert json.loads(text_of(post(server, body(list_prompt("names of bakery goods", WHALES))))) == [0, 1, 0]
        short_words = body(list_prompt("whale, but not the was", WHALES))
        assert text_of(post(server, short_words)) == "[1, 0, 1]"


def test_marked_texts_are_judged_by_what_the_marks_touch() -> None:
    text = "the whale sank the ship"
    items = [JudgeItem(text, ((4, 6),)), JudgeItem(text, ((19, 23),))]
    with ChatServer() as server:
        assert text_of(post(server, body(list_prompt("words such as whale", items)))) == "[1, 0]"


@pytest.mark.parametrize(("item", "word"), [(WHALES[0], "yes"), (WHALES[1], "no")])
def test_yes_and_no_come_with_probabilities(item: JudgeItem, word: str) -> None:
    choice = {"structured_outputs": {"choice": ["yes", "no"]}}
    asked = body(single_prompt("words such as whale", item), **choice, logprobs=True, top_logprobs=10)
    with ChatServer() as server:
        reply = json.loads(post(server, asked)[2])["choices"][0]
    shares = {one["token"]: math.exp(one["logprob"]) for one in reply["logprobs"]["content"][0]["top_logprobs"]}
    assert reply["message"]["content"] == word
    assert sum(shares.values()) <= 1
    assert max(shares, key=lambda token: shares[token]) == f" {word}" and {" yes", " no"} <= set(shares)


def test_it_explains_by_the_marked_words() -> None:
    tokens = (" the", " wh", "ale", " sank")
    windows = tuple(Example(n, n, tokens, (0.0, 0.0, 4.0, 0.0), decile=9) for n in range(2))
    assert spans(tokens, (False, False, True, False)) == ((7, 10),)  # half a word
    asked = body(explain_prompt(ExplainExamples("s", "7", 0.0, 4.0, windows), windows))
    with ChatServer() as server:
        for options in ({}, of_schema(SCHEMA), {"structured_outputs": {"json": SCHEMA}}):
            assert json.loads(text_of(post(server, {**asked, **options}))) == {"explanation": "words such as whale"}


def test_replies_depend_on_the_request_alone() -> None:
    schema = {
        "type": "object",
        "properties": {"place": {"enum": ["a", "b", "c", "d"]}, "note": {"type": "string", "minLength": 9}},
    }
    asked = [body([Message("user", f"where is {n}?")], **of_schema(schema)) for n in range(12)]
    replies = []
    for _ in range(2):
        with ChatServer() as server:
            replies.append([post(server, one)[2] for one in asked])
            asked.reverse()
    assert replies[0] == replies[1][::-1]
    values = [json.loads(json.loads(reply)["choices"][0]["message"]["content"]) for reply in replies[0]]
    assert all(value["place"] in "abcd" and len(value["note"]) >= 9 for value in values)
    assert len({value["place"] for value in values}) > 1


def test_a_reply_is_cut_at_the_limit() -> None:
    with ChatServer() as server:
        reply = json.loads(post(server, {**LIST, "max_tokens": 2})[2])
    assert reply["choices"][0]["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 2


# faults


def test_429_says_when_to_come_back_in_seconds_or_as_a_date() -> None:
    with always("429", retry_after_s=0.25) as server:
        answered = [post(server, LIST) for _ in range(30)]
    assert {status for status, _, _ in answered} == {429}
    seen = {headers["retry-after"] for _, headers, _ in answered}
    dates = seen - {"0.25"}
    assert "0.25" in seen and dates
    assert all(-2 < email.utils.parsedate_to_datetime(date).timestamp() - time.time() < 2 for date in dates)


def test_errors_of_the_server_and_of_what_stands_before_it() -> None:
    with always("500") as server:
        status, headers, content = post(server, LIST)
    assert status == 500 and json.loads(content)["error"]["code"] == 500
    with always("503") as server:
        status, headers, content = post(server, LIST)
    assert status == 503 and headers["content-type"] == "text/html" and content.startswith(b"<html>")


def test_a_time_out_stays_open_and_silent() -> None:
    with always("timeout") as server:
        connection = open_request(server)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.close()
        assert server.counts() == {"received": 1, "fault:timeout": 1}


def test_a_reset_is_no_orderly_end() -> None:
    with always("reset") as server, open_request(server) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)


def test_a_slow_body_starts_at_once_and_dribbles() -> None:
    with always("slow_body", dribble_s=0.1) as server, open_request(server) as connection:
        started = time.monotonic()
        head = connection.recv(65536)
        assert head.endswith(b"\r\n\r\n") and time.monotonic() - started < 0.1
        pieces = [connection.recv(65536) for _ in range(3)]
        assert [len(piece) for piece in pieces] == [1, 1, 1] and time.monotonic() - started > 0.25


def test_a_truncated_body_ends_before_its_length() -> None:
    with always("truncated") as server, pytest.raises(http.client.IncompleteRead) as caught:
        post(server, LIST)
    assert caught.value.partial.startswith(b'{"id"') and caught.value.expected


def test_bodies_that_are_not_the_protocol() -> None:
    with always("not_json") as server:
        status, _, content = post(server, LIST)
        assert status == 200
        with pytest.raises(ValueError, match="Expecting value"):
            json.loads(content)
    with always("no_choices") as server:
        status, _, content = post(server, LIST)
        assert status == 200 and "choices" not in json.loads(content) and "usage" in json.loads(content)


def test_faults_of_the_model_are_healthy_replies() -> None:
    with always("wrong_json") as server:
        with pytest.raises(ValueError, match="delimiter"):
            json.loads(text_of(post(server, LIST)))
        assert server.counts() == {"received": 1, "fault:wrong_json": 1}
    wrapped = {"type": "object", "properties": {"answer": list_schema(3)}, "required": ["answer"]}
    with always("wrong_length") as server:
        lengths = {len(json.loads(text_of(post(server, LIST)))) for _ in range(20)}
        inside = json.loads(text_of(post(server, {**LIST, **of_schema(wrapped)})))["answer"]
    assert lengths == {2, 4} and len(inside) in lengths


def test_a_retry_gets_another_draw_and_a_rerun_the_same() -> None:
    asked = [body(list_prompt(f"words such as {word}", WHALES)) for word in ("whale", "bones", "bakery", "swam")]
    kinds = [kind for kind in KINDS if kind not in ("timeout", "slow_body")]
    runs = []
    for order in (asked, asked[::-1]):
        with ChatServer(faults=0.5, kinds=kinds, seed=3) as server:
            for one in [*order, *order, *order]:
                with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
                    post(server, one)
            runs.append({(e["key"], e["attempt"], e["event"]) for e in server.log if e["event"] != "received"})
    assert runs[0] == runs[1] and len(runs[0]) == 12
    events = [event for _, _, event in runs[0]]
    assert 0 < events.count("finished") < 12 and len(set(events)) > 3


def test_the_share_of_faults_is_the_asked_one() -> None:
    with ChatServer(faults=0.3, kinds=("500",)) as server:
        for n in range(200):
            post(server, body([Message("user", str(n))]))
        assert 35 <= server.counts()["fault:500"] <= 85  # within four standard errors of 60


# connections and the log


def test_connections_are_kept_open() -> None:
    with ChatServer() as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        used = set()
        for _ in range(3):
            connection.request("POST", "/v1/chat/completions", json.dumps(LIST))
            used.add(connection.sock.getsockname())
            assert connection.getresponse().read()
        connection.close()
        assert len(used) == 1 and server.counts() == {"received": 3, "finished": 3}


@pytest.mark.parametrize("kind", [None, "500", "wrong_json"])
def test_a_peer_that_leaves_is_noticed(kind: str | None) -> None:
    with ChatServer(delay_s=10, faults=float(kind is not None), kinds=(kind or "500",)) as server:
        connection = open_request(server)
        assert eventually(lambda: server.counts()["received"] == 1)
        connection.close()
        assert eventually(lambda: server.counts()["gone"] == 1)
        assert server.counts() == {"received": 1, "gone": 1}


def test_the_log_tells_requests_apart() -> None:
    with ChatServer() as server:
        post(server, LIST, key="sk-test")
        post(server, {**LIST, "seed": 1})
        post(server, body(single_prompt("words such as whale", WHALES[0])))
        first, second, third = (entry for entry in server.log if entry["event"] == "received")
    assert first["key"] == second["key"] != third["key"] and first["body"] != second["body"]
    assert [entry["attempt"] for entry in (first, second, third)] == [1, 2, 1]
    assert [entry["authorization"] for entry in (first, second, third)] == [True, False, False]
    assert "sk-test" not in json.dumps(server.log)


def test_many_at_once_through_the_sdk() -> None:
    from openai import AsyncOpenAI

    async def ask_all(url: str) -> list[str]:
        async with AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            create = client.chat.completions.create
            replies = await asyncio.gather(*(create(**LIST) for _ in range(64)))  # type: ignore[call-overload]
        return [reply.choices[0].message.content for reply in replies]

    with ChatServer(delay_s=0.1) as server:
        started = time.monotonic()
        assert set(asyncio.run(ask_all(server.base_url))) == {"[1, 0, 1]"}
        assert time.monotonic() - started < 64 * 0.1 / 2  # side by side
        assert server.counts() == {"received": 64, "finished": 64}


def test_as_a_process_it_prints_its_port_and_writes_its_log(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.support.servers",
        "--log",
        str(tmp_path / "log"),
        "--faults",
        "1",
        "--kinds",
        "500,503",
    ]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        server = ChatServer(port=int(process.stdout.readline()))  # never entered: for its port
        assert post(server, LIST)[0] in (500, 503)
        events = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
        process.kill()
    assert events[0] == "received" and events[1] in ("fault:500", "fault:503")


# refusals


def test_keys_are_checked_and_echoed() -> None:
    for owner in ("vllm", "other"):
        with ChatServer(require_key="sk-right", echo_key=True, owned_by=owner) as server:
            status, headers, content = post(server, LIST, key="sk-wrong")
            assert status == 401 and b"Bearer sk-wrong" in content
            assert headers["x-seen-authorization"] == "Bearer sk-wrong"
            assert post(server, LIST, key="sk-right")[0] == 200
            assert server.counts() == {"received": 2, "refused:401": 1, "finished": 1}


def test_what_the_server_says_it_is() -> None:
    for owner, status in (("vllm", 200), ("other", 404)):
        with ChatServer(owned_by=owner) as server:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
            connection.request("GET", "/v1/models")
            listed = json.loads(connection.getresponse().read())["data"]
            connection.request("GET", "/version")
            assert connection.getresponse().status == status
            connection.close()
            assert [(one["id"], one["owned_by"]) for one in listed] == [("stand-in", owner)]
            assert server.counts() == {"GET /v1/models": 1, "GET /version": 1}


def test_parameters_and_models_can_be_refused() -> None:
    with ChatServer(refuse=("max_tokens",), owned_by="other") as server:
        status, _, content = post(server, LIST)
        assert status == 400 and json.loads(content)["error"]["param"] == "max_tokens"
        renamed = {name: value for name, value in LIST.items() if name != "max_tokens"}
        assert post(server, {**renamed, "max_completion_tokens": 60})[0] == 200
        assert post(server, {**LIST, "model": "another"})[0] == 404


def test_prompts_and_replies_that_are_too_long() -> None:
    with ChatServer(context_tokens=100) as server:
        error = json.loads(post(server, LIST)[2])["error"]
        assert error["message"].startswith("This model's maximum context length is 100 tokens.")
        assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "input_tokens", 400)
        short = body([Message("user", "hello")])
        assert post(server, short)[0] == 200
        status, _, content = post(server, {**short, "max_tokens": 200})
        assert status == 400 and json.loads(content)["error"]["param"] == "max_tokens"
        assert server.counts()["refused:400"] == 2
