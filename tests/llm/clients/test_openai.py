"""The client for chat-completions servers, against servers on real sockets that fail in many ways."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import gzip
import json
import logging
import math
import random
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from evalkit.errors import BadConfig, ClientDown, ContextOverflow, MissingExtra, NoAnswer, RequestRefused
from evalkit.installation import install_command
from evalkit.llm.clients import openai as module
from evalkit.llm.clients.openai import OpenAIClient
from evalkit.llm.clients.recorder import Recorder
from evalkit.llm.clients.server import breaker
from evalkit.llm.clients.server import connection as servers
from evalkit.records import JudgeItem, Message, Response
from evalkit.registry import create
from scorers.judges.llm.judge import LlmJudge, list_prompt, list_schema
from tests.support.scripted import ASK, Reply, ask, ask_many, error, saying, scripted
from tests.support.servers import ChatServer

WHALES = [JudgeItem("a whale swam by"), JudgeItem("the bakery was shut"), JudgeItem("two whale bones")]
LIST = list_prompt("words such as whale", WHALES)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a hundredth of their length, and no more than one look at the list of models without a pause."""
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.3)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which are not kept."""
    slept: list[float] = []

    async def pause(_: OpenAIClient, seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(OpenAIClient, "_pause", pause)
    return slept


def client_of(*urls: str, **options: Any) -> OpenAIClient:
    return OpenAIClient("m", base_url=list(urls), **options)


def answers(*replies: Reply) -> Any:
    """One after the other, then the last one for ever."""
    left = list(replies)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


FINE: Reply = (200, saying("4"))


# what is asked, and what comes back


def test_a_request_in_the_protocol_s_words() -> None:
    with scripted(answers(FINE)) as server:
        response = ask(client_of(server.base_url, extra_body={"top_p": 0.9}), seed=3, logprobs=2)
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "How many?"}]
    told = {"model": "m", "messages": messages, "max_tokens": 5, "temperature": 0.0, "seed": 3, "top_p": 0.9}
    assert server.asked == [{**told, "logprobs": True, "top_logprobs": 2}]
    assert response == Response("4", (), 7, 2, "stop", "m")


@pytest.mark.parametrize("owned_by", ["vllm", "openai"])
def test_both_dialects_give_the_same_answers(owned_by: str) -> None:
    with ChatServer(owned_by=owned_by) as server:

        async def judge() -> list[list[Any]]:
            client = OpenAIClient(server.model, base_url=server.base_url)
            found = []
            for mode in ("list", "single"):
                answers = await LlmJudge(client, mode=mode).judge("words such as whale", WHALES)
                found.append([(answer.match, answer.probability) for answer in answers])
            await client.close()
            return found

        in_lists, one_by_one = asyncio.run(judge())
    assert [match for match, _ in in_lists] == [True, False, True]
    assert [match for match, _ in one_by_one] == [True, False, True]
    # the stand-in gives " yes" 0.81, "Yes" 0.08 and " no" 0.09, or the other way round
    share = 0.89 / 0.98
    assert [round(p, 9) for _, p in one_by_one] == [round(p, 9) for p in (share, 1 - share, share)]
    assert server.counts()["GET /v1/models"] == 1


def test_what_may_be_wrapped_is_and_comes_back_bare() -> None:
    asked = {"schema": list_schema(3)}, {"choices": ("yes", "no")}, {"regex": "yes|no"}
    texts = {}
    for owned_by in ("vllm", "another"):
        with ChatServer(owned_by=owned_by) as server:
            client = OpenAIClient(server.model, base_url=server.base_url)

            async def both(client: OpenAIClient = client) -> list[str]:
                options = [{"seed": 1, "max_tokens": 40} | one for one in asked]
                replies = await asyncio.gather(*(client.generate(LIST, **one) for one in options))
                await client.close()
                return [reply.text for reply in replies]

            texts[owned_by] = asyncio.run(both())
    assert texts["vllm"] == texts["another"] == ["[1, 0, 1]", "yes", "yes"]


def test_a_reply_that_is_not_wrapped_though_asked_to_be() -> None:
    with scripted(answers((200, saying("[1, 0]"))), owned_by="ignores schemas") as server:
        assert ask(client_of(server.base_url), schema=list_schema(2)).text == "[1, 0]"
        assert server.asked[0]["response_format"]["type"] == "json_schema"


def test_constraints_can_be_said_and_then_nobody_is_asked_what_it_is() -> None:
    for constraints, names in (("none", set()), ("json_schema", {"response_format"}), ("vllm", {"structured_outputs"})):
        with scripted(answers(FINE)) as server:
            ask(client_of(server.base_url, constraints=constraints), choices=("4", "5"))
        (asked,) = server.asked
        assert set(asked) - {"model", "messages", "max_tokens", "temperature"} == names
        assert len(server.headers) == 1


@pytest.mark.parametrize(
    "models", [(404, {"detail": "Not Found"}), (500, {}), (200, b"<html>"), (200, {"data": 5}), (401, {"error": "no"})]
)
def test_a_server_without_a_list_of_models(models: Reply, quick: None) -> None:
    with scripted(answers(FINE), models=lambda: models) as server:
        assert ask(client_of(server.base_url), choices=("4", "5")).text == "4"
        assert "response_format" in server.asked[0]


def test_what_a_model_declines_is_its_reply() -> None:
    with scripted(answers((200, saying(None, refusal="I would rather not.")), (200, saying(None)))) as server:
        assert ask(client_of(server.base_url)).text == "I would rather not."
        empty = ask(client_of(server.base_url))
    assert (empty.text, empty.finish_reason) == ("", "stop")


def test_half_characters_are_neither_sent_nor_kept() -> None:
    with scripted(answers((200, saying("a\ud83d")))) as server:
        assert ask(client_of(server.base_url), Message("user", "b\ud83d")).text == "a?"
        assert server.asked[0]["messages"] == [{"role": "user", "content": "b?"}]


def test_the_name_tells_what_changes_answers() -> None:
    def name(**options: Any) -> str:
        return client_of("http://localhost:1/v1", **options).name

    assert name() == name(temperature=0) == name(temperature=0.0, concurrency=3, timeout_s=1) == "m"
    assert name(temperature=0.5) == "m;temperature=0.5"
    assert name(temperature=None) == "m;temperature=default"
    nested = {"top_p": 0.9, "chat_template_kwargs": {"b": 1, "a": False}, "stop": "x"}
    assert name(extra_body=nested) == 'm;chat_template_kwargs={"a": false, "b": 1};stop=x;top_p=0.9'
    assert client_of("http://b:1/v1").name == client_of("http://a:1/v1", "http://b:1/v1").name


# options


def test_the_server_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(answers(FINE)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url + "/")
        assert ask(OpenAIClient("m")).text == "4"
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    with pytest.raises(
        BadConfig, match="the API key in the environment variable OPENAI_API_KEY; seen no such variable"
    ):
        OpenAIClient("m")
    with pytest.raises(BadConfig, match="environment variable MY_KEY"):
        OpenAIClient("m", base_url="https://api.openai.com/v1/", api_key_env="MY_KEY")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("concurrency", 0),
        ("concurrency", "64"),
        ("concurrency", 1.5),
        ("max_attempts", 0),
        ("timeout_s", 0),
        ("timeout_s", math.inf),
        ("timeout_s", True),
        ("requests_per_minute", 0),
        ("tokens_per_minute", "many"),
        ("temperature", "hot"),
        ("temperature", -1),
        ("constraints", "grammar"),
        ("extra_body", "top_p"),
        ("extra_body", {"stream": True}),
        ("extra_body", {"a": math.nan}),
    ],
)
def test_options_that_cannot_be(option: str, value: Any) -> None:
    with pytest.raises(BadConfig, match=f"{option} of client 'openai': expected .*; seen "):
        create("clients", "openai", model="m", base_url="http://localhost:1/v1", **{option: value})


def test_without_the_extra_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("openai", "tenacity"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtra, match=rf"{package}: .*fix: {re.escape(install_command('api'))}"):
                create("clients", "openai", model="m", base_url="http://localhost:1/v1")


# failures


def test_a_server_says_when_to_come_back(pauses: list[float]) -> None:
    in_20_s = email.utils.formatdate(time.time() + 20, usegmt=True)
    for headers, least, most in (
        ({"Retry-After": "7"}, 7, 8),
        ({"Retry-After": in_20_s}, 17, 22),
        ({"Retry-After-Ms": "3500", "Retry-After": "60"}, 3.5, 4.5),
        ({"Retry-After": "-3"}, 0, 0.5),
        ({"Retry-After": "86400"}, 300, 331),
        ({"Retry-After": "nan"}, 0, 0.5),
        ({"Retry-After": "soon"}, 0, 0.5),
    ):
        for status in (429, 503):
            pauses.clear()
            with scripted(answers((status, error("wait"), headers), FINE)) as server:
                assert ask(client_of(server.base_url)).text == "4"
            assert len(pauses) == 1 and least <= pauses[0] <= most, (headers, pauses)


def test_who_was_told_the_same_does_not_come_back_at_the_same_moment(pauses: list[float]) -> None:
    seen: Counter[str] = Counter()

    def busy(body: dict[str, Any]) -> Reply:
        question = body["messages"][0]["content"]
        seen[question] += 1
        return (429, error("wait"), {"Retry-After": "10"}) if seen[question] == 1 else FINE

    with scripted(busy) as server:
        replies = asyncio.run(ask_many(client_of(server.base_url), 20))
    assert all(isinstance(reply, Response) for reply in replies)
    assert len(set(pauses)) == 20 and min(pauses) >= 10 and max(pauses) < 11.1


def test_pauses_grow_and_differ(pauses: list[float]) -> None:
    random.seed(0)
    runs = []
    with scripted(answers((500, error("broken")))) as server:
        for _ in range(5):
            pauses.clear()
            with pytest.raises(ClientDown, match="status 500: broken"):
                ask(client_of(server.base_url, constraints="none"))
            runs.append(list(pauses))
    assert [len(run) for run in runs] == [9] * 5 and len(server.asked) == 50
    for attempt in range(9):
        most = min(0.5 * 2**attempt, 30)
        drawn = [run[attempt] for run in runs]
        assert max(drawn) <= most and len(set(drawn)) == 5
        assert max(drawn) > most / 3  # five uniform draws
    assert max(map(sum, runs)) < 122  # so long a user waits at most for a server that breaks at once


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, error("no such thing"), RequestRefused, "status 400: no such thing"),
        (400, error("the text is too rude", param="messages"), RequestRefused, "too rude"),
        (
            401,
            {"error": "Unauthorized"},
            ClientDown,
            "Unauthorized.*set the right API key in the environment; it is missing or wrong",
        ),
        (402, error("pay"), ClientDown, "add credit to the account, which has none left"),
        (403, error("not for you"), ClientDown, "use an API key that has access to this model"),
        (
            404,
            error("The model `m` does not exist.", param="model"),
            ClientDown,
            "check the model name and the base URL",
        ),
        (404, b"<html>nginx</html>", ClientDown, "check the model name and the base URL"),
        (405, {"detail": "Method Not Allowed"}, ClientDown, "Method Not Allowed.*check the base URL"),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "bad"}]}, RequestRefused, "status 422: body.n: bad"),
        (
            429,
            error("You exceeded your quota", code="insufficient_quota"),
            ClientDown,
            "add credit to the account, which has none left",
        ),
        (
            429,
            error("You exceeded your quota", type="insufficient_quota"),
            ClientDown,
            "add credit to the account, which has none left",
        ),
    ],
)
def test_what_no_retry_heals_is_sent_once(status: int, body: Any, kind: type[Exception], words: str) -> None:
    """But for an error that may be about any parameter: once without each of these too, and never again."""
    with scripted(answers((status, body))) as server:
        client = client_of(server.base_url)

        async def twice() -> list[BaseException | Response]:
            questions = ([Message("system", "Answer."), Message("user", text)] for text in ("How many?", "Which?"))
            found = [
                (await asyncio.gather(client.generate(one, max_tokens=5), return_exceptions=True))[0]
                for one in questions
            ]
            await client.close()
            return found

        for error in asyncio.run(twice()):
            assert isinstance(error, kind) and re.search(f"{server.base_url}.*{words}", str(error))
    first = [sent for sent in server.asked if "Which?" not in str(sent["messages"])]
    assert len(first) == (
        4 if kind is RequestRefused else 1
    )  # as it is; without the system role, temperature, max_tokens
    assert len(server.asked) - len(first) <= 1


@pytest.mark.parametrize("fault", ["500", "503", "429", "reset", "truncated", "not_json", "no_choices"])
def test_what_a_retry_heals(fault: str, quick: None) -> None:
    healed = None
    for seed in range(20):  # a server that fails the first attempt, and answers a later one
        with ChatServer(faults=0.5, kinds=(fault,), seed=seed, retry_after_s=0.01) as server:
            response = ask(OpenAIClient(server.model, base_url=server.base_url), max_tokens=40)
        events = [entry["event"] for entry in server.log if entry["event"] not in ("GET /v1/models", "received")]
        assert events[-1] == "finished" and set(events[:-1]) <= {f"fault:{fault}"}
        if len(events) > 1:
            healed = response
            break
    assert healed is not None and healed.text.startswith("a reply of no use")


@pytest.mark.parametrize("fault", ["timeout", "slow_body"])
def test_patience_ends_with_the_last_byte(fault: str, quick: None) -> None:
    with ChatServer(faults=1.0, kinds=(fault,), dribble_s=0.02) as server:
        began = time.monotonic()
        with pytest.raises(ClientDown, match=r"no reply within 0\.2 s.*raise timeout_s"):
            ask(OpenAIClient(server.model, base_url=server.base_url, timeout_s=0.2, max_attempts=3))
        assert 0.55 < time.monotonic() - began < 3
    assert server.counts()["received"] == 3


def test_one_that_gets_no_answer_while_others_do(quick: None) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] == "Question 3?":
            return 500, error("this one I cannot")
        time.sleep(0.02)
        return FINE

    with scripted(answer) as server:
        replies = asyncio.run(ask_many(client_of(server.base_url, max_attempts=4, concurrency=2), 8))
    failed = [reply for reply in replies if isinstance(reply, Exception)]
    assert len(failed) == 1 and isinstance(failed[0], NoAnswer)
    assert "expected an answer in 4 attempts; seen status 500: this one I cannot" in str(failed[0])


def test_a_prompt_that_is_too_long() -> None:
    with ChatServer(context_tokens=50) as server:
        client = OpenAIClient(server.model, base_url=server.base_url)
        with pytest.raises(ContextOverflow) as caught:
            ask(client, Message("user", "word " * 100))
        assert (caught.value.limit, caught.value.needed) == (50, 51)  # all that vLLM says: one more than fits
        with pytest.raises(ContextOverflow) as caught:
            ask(client, Message("user", "short"), max_tokens=80)
        assert (caught.value.limit, caught.value.needed) == (50, 80)
    assert server.counts()["received"] == 2


@pytest.mark.parametrize("owned_by", ["vllm", "another"])
def test_refused_parameters_are_left_out_from_then_on(owned_by: str, caplog: pytest.LogCaptureFixture) -> None:
    refuse = ("seed", "temperature", "top_logprobs", "logprobs", "response_format", "structured_outputs", "max_tokens")
    with ChatServer(refuse=refuse, owned_by=owned_by) as server:
        client = OpenAIClient(server.model, base_url=server.base_url)

        async def twice() -> list[list[str]]:
            found = []
            for _ in range(2):
                questions = [[*LIST, Message("user", f"Again, {n}.")] for n in range(20)]
                options = {"schema": list_schema(3), "seed": 1, "logprobs": 2, "max_tokens": 40}
                replies = await asyncio.gather(*(client.generate(one, **options) for one in questions))
                found.append([reply.text for reply in replies])
            await client.close()
            return found

        first, second = asyncio.run(twice())
        events = [entry["event"] for entry in server.log]
    assert first == second and len(first) == 20
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    refused = [text.split(" rejects ")[1].split(" ")[0] for text in told]
    own = {"structured_outputs"} if owned_by == "vllm" else set()
    assert set(refused) == {*refuse} - {"structured_outputs"} | own
    assert len(refused) == len(set(refused))  # one warning each, however many requests met it
    assert events[-40:].count("finished") == 20 and events.count("finished") == 40  # the second time nothing is refused


def test_a_model_that_takes_no_system_message() -> None:
    def gemma(body: dict[str, Any]) -> Reply:
        system = any(message["role"] == "system" for message in body["messages"])
        return (400, error("System role not supported")) if system else FINE

    with scripted(gemma) as server:
        assert ask(client_of(server.base_url)).text == "4"
    assert server.asked[1]["messages"] == [{"role": "user", "content": "Answer.\n\nHow many?"}]


def test_a_parameter_that_cannot_be_left_out() -> None:
    with (
        scripted(answers((400, error("Unsupported: 'top_k'", param="top_k")))) as server,
        pytest.raises(RequestRefused, match="top_k"),
    ):
        ask(client_of(server.base_url, extra_body={"top_k": 5}))
    assert len(server.asked) == 1


# several at once


def test_never_more_in_flight_than_said(quick: None) -> None:
    with ChatServer(delay_s=0.02) as one, ChatServer(delay_s=0.02) as other:
        client = OpenAIClient(one.model, base_url=[one.base_url, other.base_url], concurrency=7)
        replies = asyncio.run(ask_many(client, 60))
        logs = one.log, other.log
    assert all(isinstance(reply, Response) for reply in replies)
    changes = sorted(
        (entry["time"], {"received": 1, "finished": -1}.get(entry["event"], 0)) for log in logs for entry in log
    )
    in_flight = most = 0
    for _, change in changes:
        in_flight += change
        most = max(most, in_flight)
    assert 4 <= most <= 7
    shares = [sum(entry["event"] == "finished" for entry in log) for log in logs]
    assert sum(shares) == 60 and min(shares) >= 20


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """A URL that takes no connection and refuses none: its queue is full."""
    with socket.socket() as listening, contextlib.ExitStack() as waiting:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(8):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listening.getsockname())
        time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """A URL that refuses every connection."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"


@contextlib.contextmanager
def mute() -> Iterator[str]:
    """A URL that takes connections and never says a word."""
    with ChatServer() as server, socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        assert server.port
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


@pytest.mark.parametrize("dead", [nobody, black_hole, mute])
def test_a_dead_server_among_others_costs_little(
    dead: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(servers, "_CONNECT_S", 0.3)
    monkeypatch.setattr(servers, "_LOOK_S", 0.3)
    with dead() as url, ChatServer(delay_s=0.01) as server:
        client = OpenAIClient(server.model, base_url=[url, server.base_url], concurrency=8)
        began = time.monotonic()
        replies = asyncio.run(ask_many(client, 200))
        took = time.monotonic() - began
    assert all(isinstance(reply, Response) for reply in replies)
    assert took < 8
    told = [record.getMessage() for record in caplog.records if url in record.getMessage()]
    assert len(told) == 1 and "; retrying" in told[0]


def test_a_server_that_falls_silent_is_left_alone_and_comes_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(breaker, "_REST_S", 0.2)
    with contextlib.ExitStack() as running:
        steady = running.enter_context(ChatServer(delay_s=0.005))
        with ChatServer(delay_s=0.005) as server:
            url, port = server.base_url, server.port
        client = OpenAIClient(steady.model, base_url=[url, steady.base_url], concurrency=4)

        async def questions(numbers: range) -> list[Response]:
            asked = (client.generate([Message("user", f"{number}")], max_tokens=5) for number in numbers)
            return await asyncio.gather(*asked)

        async def with_one_and_with_two() -> list[Response]:
            alone = await questions(range(10))
            again = running.enter_context(ChatServer(port=port, delay_s=0.005))
            await asyncio.sleep(1)
            together = await questions(range(10, 70))
            assert again.counts()["finished"] >= 10
            await client.close()
            return alone + together

        replies = asyncio.run(with_one_and_with_two())
    assert len(replies) == 70
    told = [record.getMessage() for record in caplog.records if url in record.getMessage()]
    assert len(told) == 2 and "; retrying" in told[0] and "answers again" in told[1]


def test_who_asks_in_turn_is_not_held_up_by_a_dead_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(breaker, "_REST_S", 0.001)
    monkeypatch.setattr(breaker, "_LONGEST_REST_S", 0.001)
    caplog.set_level(logging.DEBUG, "evalkit")
    with nobody() as url, ChatServer() as server:
        client = OpenAIClient(server.model, base_url=[url, server.base_url])

        async def in_turn() -> None:
            for number in range(10):
                await client.generate([Message("user", f"{number}")], max_tokens=5)
            await client.close()

        asyncio.run(in_turn())
    assert sum("retrying in" in record.getMessage() for record in caplog.records) == 1


def test_a_server_that_breaks_some_connections_is_asked_on(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "_REST_S", 0.05)  # a rest after a break must not outlast the test
    with ChatServer(faults=0.3, kinds=("reset",), delay_s=0.02) as flaky, ChatServer(delay_s=0.02) as steady:
        client = OpenAIClient(steady.model, base_url=[flaky.base_url, steady.base_url], concurrency=8)
        replies = asyncio.run(ask_many(client, 120))
        shares = [server.counts()["received"] for server in (flaky, steady)]
    assert all(isinstance(reply, Response) for reply in replies)
    assert shares[0] > 0.2 * sum(shares), shares


@pytest.mark.parametrize(
    ("dead", "words"), [(nobody, "no connection"), (black_hole, "no connection"), (mute, "no reply")]
)
def test_when_all_are_dead_everybody_hears_it_soon(dead: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten attempts of 64 requests, and of hundreds that wait behind them, all times a hundredth of the default ones."""
    monkeypatch.setattr(breaker, "_REST_S", breaker._REST_S / 100)
    for name in ("_CONNECT_S", "_LOOK_S"):
        monkeypatch.setattr(servers, name, getattr(servers, name) / 100)
    for name in ("_FIRST_PAUSE_S", "_LONGEST_PAUSE_S", "_PATIENCE_S"):
        monkeypatch.setattr(module, name, getattr(module, name) / 100)
    with dead() as url:
        began = time.monotonic()
        replies = asyncio.run(ask_many(client_of(url, timeout_s=3.0), 300))
        took = time.monotonic() - began
    assert {type(reply) for reply in replies} == {ClientDown}
    assert {words} == {words for reply in replies if words in str(reply)}
    assert took < 10  # three seconds by these times, and what the machine takes


def test_a_server_that_stops_answering_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known, takes connections, and answers no more: one time-out that is longer than our patience is enough."""
    monkeypatch.setattr(module, "_PATIENCE_S", 0.3)
    with ChatServer(faults=1.0, kinds=("timeout",)) as server:
        began = time.monotonic()
        with pytest.raises(ClientDown, match=r"no reply within 0\.5 s"):
            ask(OpenAIClient(server.model, base_url=server.base_url, timeout_s=0.5))
        assert time.monotonic() - began < 2
    assert server.counts()["received"] == 1


def test_a_wrong_key_is_tried_by_those_in_flight_alone() -> None:
    with ChatServer(require_key="sk-another", delay_s=0.02) as server:
        client = OpenAIClient(server.model, base_url=server.base_url, concurrency=4)
        replies = asyncio.run(ask_many(client, 50))
    assert {type(reply) for reply in replies} == {ClientDown}
    assert server.counts()["received"] == 4


def test_bad_news_ends_a_long_pause() -> None:
    def answer(body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] == "Question 0?":
            return 429, error("wait"), {"Retry-After": "60"}
        time.sleep(0.2)
        return 401, error("wrong key")

    with scripted(answer) as server:
        began = time.monotonic()
        replies = asyncio.run(ask_many(client_of(server.base_url), 2))
    assert {type(reply) for reply in replies} == {ClientDown} and len(server.asked) == 2
    assert time.monotonic() - began < 5


def test_a_long_pause_is_told_of_once(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    seen: Counter[str] = Counter()

    def busy(body: dict[str, Any]) -> Reply:
        question = body["messages"][0]["content"]
        seen[question] += 1
        return (429, error("wait"), {"Retry-After": "45"}) if seen[question] == 1 else FINE

    with scripted(busy) as server:
        asyncio.run(ask_many(client_of(server.base_url), 12))
    assert len(pauses) == 12
    (told,) = [record.getMessage() for record in caplog.records]
    assert "status 429: wait; retrying in 4" in told


def test_who_asks_after_all_were_given_up_is_tried_anew(quick: None) -> None:
    with scripted(answers((401, error("wrong key")), FINE)) as server:
        client = client_of(server.base_url)
        with pytest.raises(ClientDown):
            ask(client)
        assert ask(client).text == "4"


@pytest.mark.parametrize(("rate", "count", "least_s"), [(600, 15, 0.45), (60_000, 100, 0.0)])
def test_requests_per_minute(rate: float, count: int, least_s: float) -> None:
    with ChatServer() as server:
        client = OpenAIClient(server.model, base_url=server.base_url, requests_per_minute=rate)
        asyncio.run(ask_many(client, count))
        times = sorted(entry["time"] for entry in server.log if entry["event"] == "received")
    assert len(times) == count
    assert least_s <= times[-1] - times[0] < least_s + 2
    within_a_second = max(sum(first <= one < first + 1 for one in times) for first in times)
    assert within_a_second <= 2 * rate / 60 + 1  # a second's worth at once, then evenly


# loops and cancelling


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_one_client_in_two_event_loops(close: bool) -> None:
    with ChatServer(delay_s=0.01) as server:
        client = OpenAIClient(server.model, base_url=server.base_url, concurrency=3, requests_per_minute=60_000)

        async def some() -> list[str]:
            replies = await asyncio.gather(
                *(client.generate([Message("user", f"{n}")], max_tokens=9) for n in range(12))
            )
            if close:
                await client.close()
            return [reply.text for reply in replies]

        first = asyncio.run(some())
        assert asyncio.run(some()) == first and len(set(first)) > 1
        asyncio.run(client.close())
    assert server.counts()["finished"] == 24 and server.counts()["GET /v1/models"] == 1


def test_who_goes_away_takes_nobody_s_answer_along(tmp_path: Any) -> None:
    with ChatServer(delay_s=0.2) as server:
        live = OpenAIClient(server.model, base_url=server.base_url)
        client = Recorder(tmp_path / "a.sqlite", live)

        async def race() -> Response:
            hasty = asyncio.create_task(client.generate(ASK, max_tokens=5))
            patient = asyncio.create_task(client.generate(ASK, max_tokens=5))
            await asyncio.sleep(0.05)
            hasty.cancel()
            with pytest.raises(asyncio.CancelledError):
                await hasty
            response = await patient
            await client.close()
            return response

        assert asyncio.run(race()).text
    assert server.counts()["received"] == server.counts()["finished"] == 1


def test_a_cancelled_request_frees_its_place() -> None:
    with ChatServer(faults=0.5, kinds=("timeout",), seed=3) as server:
        client = OpenAIClient(server.model, base_url=server.base_url, concurrency=2, timeout_s=30)

        async def impatient() -> int:
            answered = 0
            for number in range(12):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(client.generate([Message("user", f"{number}")], max_tokens=5), 0.3)
                    answered += 1
            await client.close()
            return answered

        answered = asyncio.run(impatient())
        counts = server.counts()
    assert counts["received"] == 12 and 0 < answered == counts["finished"] < 12


# limits, and servers that keep failing


def test_what_waits_for_its_turn_is_never_sent_after_the_end() -> None:
    async def go(client: OpenAIClient) -> list[Response | BaseException]:
        asking = asyncio.create_task(ask_many(client, 20))
        await asyncio.sleep(0.5)
        client.finish()
        return await asyncio.wait_for(asking, 2)

    with ChatServer() as server:
        replies = asyncio.run(go(OpenAIClient(server.model, base_url=server.base_url, requests_per_minute=30)))
        assert server.counts()["received"] == 1
    assert Counter(type(reply) for reply in replies) == {Response: 1, NoAnswer: 19}


def test_bad_news_reach_those_who_wait_for_their_turn() -> None:
    with scripted(answers((401, error("wrong key")))) as server:
        began = time.monotonic()
        replies = asyncio.run(ask_many(client_of(server.base_url, requests_per_minute=2), 30))
    assert {type(reply) for reply in replies} == {ClientDown} and len(server.asked) == 1
    assert time.monotonic() - began < 5


def test_tokens_per_minute_are_those_that_replies_report() -> None:
    """Replies say that they took 9 tokens; each was reckoned with a hundred."""
    with scripted(answers(FINE)) as server:
        client = client_of(server.base_url, tokens_per_minute=6000, constraints="none")

        async def in_turn() -> float:
            began = time.monotonic()
            for number in range(12):
                await client.generate([Message("user", f"{number}")], max_tokens=100)
            await client.close()
            return time.monotonic() - began

        assert 0.05 < asyncio.run(in_turn()) < 4  # not the eleven seconds of their estimates


@pytest.mark.parametrize("status", [200, 429])
def test_a_server_s_word_on_what_is_left_is_kept_to(status: int, quick: None) -> None:
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1.2s"}
    body = saying("4") if status == 200 else error("slow down")
    with scripted(answers((status, body, headers), FINE)) as server:
        client = client_of(server.base_url, constraints="none")

        async def twice() -> float:
            await client.generate(ASK, max_tokens=5)
            began = time.monotonic()
            await client.generate(ASK, max_tokens=6)
            await client.close()
            return time.monotonic() - began

        began = time.monotonic()
        second = asyncio.run(twice())
    assert (second if status == 200 else time.monotonic() - began) > 1.1 and len(server.asked) == (
        2 if status == 200 else 3
    )


def test_limits_change_no_name() -> None:
    limited = client_of("http://localhost:1/v1", requests_per_minute=5, tokens_per_minute=7)
    assert limited.name == client_of("http://localhost:1/v1").name == "m"


def test_a_server_that_keeps_failing_is_left_to_the_others(quick: None, caplog: pytest.LogCaptureFixture) -> None:
    with ChatServer(faults=1.0, kinds=("500",)) as broken, ChatServer(delay_s=0.01) as steady:
        client = OpenAIClient(steady.model, base_url=[broken.base_url, steady.base_url], concurrency=8)
        replies = asyncio.run(ask_many(client, 300))
        asked = broken.counts()["received"]
    assert all(isinstance(reply, Response) for reply in replies)
    assert 5 <= asked <= 20  # as many as it takes to know, and what was under way then
    told = [record.getMessage() for record in caplog.records if broken.base_url in record.getMessage()]
    assert told == [f"{broken.base_url}: status 500; retrying"]


def test_a_server_that_fails_more_often_than_not_is_asked_now_and_then(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "_REST_S", 0.1)
    monkeypatch.setattr(breaker, "_LONGEST_REST_S", 0.2)
    with ChatServer(faults=0.8, kinds=("500",)) as flaky, ChatServer(delay_s=0.02) as steady:
        client = OpenAIClient(steady.model, base_url=[flaky.base_url, steady.base_url], concurrency=8)
        replies = asyncio.run(ask_many(client, 400))
        asked, failed = flaky.counts()["received"], flaky.counts()["fault:500"]
    assert all(isinstance(reply, Response) for reply in replies)
    assert 5 < asked < 150 and failed < 0.25 * (400 + failed)


def test_when_several_fail_one_line_says_what_is_wrong_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_PAUSE_S", "_LONGEST_PAUSE_S", "_PATIENCE_S"):
        monkeypatch.setattr(module, name, getattr(module, name) / 100)
    with nobody() as url, scripted(answers((503, error("busy")))) as broken:
        replies = asyncio.run(ask_many(client_of(url, broken.base_url, constraints="none"), 20))
    assert {type(reply) for reply in replies} == {ClientDown}
    told = str(replies[0])
    assert f"{url}: no connection" in told and f"{broken.base_url}: status 503" in told and "\n" not in told


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.usefixtures("quick")
def test_no_reply_is_read_without_end(status: int) -> None:
    """However little of it there is on the wire."""
    large = gzip.compress(b" " * (servers.REPLY_BYTES + 1000) + json.dumps(saying("4")).encode(), 1)
    assert len(large) < servers.REPLY_BYTES / 50
    with scripted(answers((status, large, {"Content-Encoding": "gzip"}), FINE)) as server:
        assert ask(client_of(server.base_url)).text == "4"
        assert len(server.asked) == 2
    never = pytest.raises(ClientDown, match="seen a reply of more than 64 MB")
    with scripted(answers((status, large, {"Content-Encoding": "gzip"}))) as server, never:
        ask(client_of(server.base_url, max_attempts=2))
