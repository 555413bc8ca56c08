"""The client that asks in batches, against a server that has them: everything comes once, whatever happens."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import BadConfig, ClientDown, ContextOverflow, NoAnswer, RequestRefused, StorageError
from evalkit.llm.accounting.answer_store import KeyedRequest, Recorded
from evalkit.llm.clients.batch import api as batches
from evalkit.llm.clients.batch import poller as batch_following
from evalkit.llm.clients.batch import sizing as batch_room
from evalkit.llm.clients.batch.client import OpenAIBatchClient
from evalkit.llm.clients.batch.ledger import Ledger, requests_in_batches
from evalkit.llm.clients.openai import OpenAIClient
from evalkit.llm.clients.recorder import Recorder
from evalkit.llm.clients.replay import ReplayClient
from evalkit.records import JudgeItem, Message, Response
from evalkit.registry import create
from scorers.judges.llm.judge import list_prompt, list_schema, single_prompt
from tests.support.batch_server import BatchServer
from tests.support.servers import ChatServer

WHALES = [JudgeItem("a whale swam by"), JudgeItem("the bakery was shut"), JudgeItem("two whale bones")]
LIST: dict[str, Any] = {"schema": list_schema(3), "seed": 1, "max_tokens": 40}
SINGLE: dict[str, Any] = {"choices": ("yes", "no"), "logprobs": 10, "seed": 2, "max_tokens": 1}
Ask = tuple[list[Message], dict[str, Any]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(batches, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(batch_room, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(batch_room, "_LONGEST_PAUSE_S", 0.1)


def client_of(server: ChatServer, **options: Any) -> OpenAIBatchClient:
    quick = {"quiet_s": 0.05, "look_every_s": 0.03, "listed_within_s": 0.3, "probe": False, "timeout_s": 5.0}
    return OpenAIBatchClient(server.model, **{"base_url": server.base_url, **quick, **options})


def questions(count: int, first: int = 0) -> list[Ask]:
    """Different ones of one form."""
    return [([Message("user", f"Question {number}?")], {"max_tokens": 30}) for number in range(first, first + count)]


def mixed() -> list[Ask]:
    """Of every form that explainers and judges have."""
    words = ("whale", "bakery", "bones", "swam", "shut", "\U0001f433 Wal\u2028fisch")
    return [
        *((list_prompt(f"words such as {word}", WHALES), LIST) for word in words),
        *((single_prompt(f"words such as {word}", item), SINGLE) for word in words for item in WHALES),
        *questions(5),
        ([Message("user", "Yes?")], {"regex": "yes|no", "max_tokens": 20}),
    ]


async def ask_all(client: Any, asked: Sequence[Ask]) -> list[Any]:
    """Replies or errors, in the order of asking."""
    return await asyncio.gather(*(client.generate(*one[:1], **one[1]) for one in asked), return_exceptions=True)


def go(client: Any, asked: Sequence[Ask]) -> list[Any]:
    async def all_of_it() -> list[Any]:
        try:
            return await ask_all(client, asked)
        finally:
            await client.close()

    return asyncio.run(all_of_it())


def online(server: ChatServer, asked: Sequence[Ask]) -> list[Any]:
    with ChatServer(owned_by=server.owned_by, model=server.model) as other:
        return go(OpenAIClient(other.model, base_url=other.base_url), asked)


def texts(replies: Sequence[Any]) -> list[str]:
    failed = [reply for reply in replies if not isinstance(reply, Response)]
    assert not failed, failed[:3]
    return [reply.text for reply in replies]


def once_each(server: BatchServer, count: int) -> bool:
    """Whether so many questions were answered, each of them once."""
    return len(server.answered) == count == len(set(server.answered))


# what comes back


@pytest.mark.parametrize("owned_by", ["hosted", "vllm"])
@pytest.mark.parametrize("probe", [False, True])
def test_replies_are_those_of_the_client_that_asks_at_once(owned_by: str, probe: bool) -> None:
    with BatchServer(owned_by=owned_by, work_s=0.05) as server:
        replies = go(client_of(server, probe=probe), mixed())
        assert once_each(server, len(mixed())) and len(server.batches) == 1
        assert server.counts()["received"] == (4 if probe else 0)  # one of every form
    assert replies == online(server, mixed())
    assert [reply.text for reply in replies[:2]] == ["[1, 0, 1]", "[0, 1, 0]"]


def test_the_same_rows_are_recorded_under_the_names_of_the_lines(tmp_path: Path) -> None:
    def rows(path: Path) -> list[tuple[Any, ...]]:
        query = "SELECT key, model, request, response, prompt_tokens, completion_tokens FROM answers ORDER BY key"
        with closing(sqlite3.connect(path)) as database:
            return database.execute(query).fetchall()

    with BatchServer() as server:
        go(kept(tmp_path / "batched", client_of(server)), mixed())
        live = OpenAIClient(server.model, base_url=server.base_url)
        go(Recorder(tmp_path / "online.sqlite", live), mixed())
        assert rows(tmp_path / "batched" / "calls.sqlite") == rows(tmp_path / "online.sqlite")
        assert {row[0] for row in rows(tmp_path / "online.sqlite")} == server.keys


def kept(folder: Path, client: OpenAIBatchClient) -> Recorder:
    """With recording and ledger in a folder, as in a run."""
    folder.mkdir(exist_ok=True)
    recorder = Recorder(folder / "calls.sqlite", client)
    client.keep_in(folder / "batches.sqlite", recorder.record_batched)
    return recorder


def test_the_name_is_that_of_the_other_client() -> None:
    with ChatServer() as server:
        options = {"temperature": 0.5, "extra_body": {"top_p": 0.9}}
        batched = client_of(server, **options)
        assert batched.name == OpenAIClient(server.model, base_url=server.base_url, **options).name


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ({"max_requests": 8}, [8, 8, 4]),
        ({"max_bytes": 1000}, None),
        ({"max_requests": 1}, [1] * 20),
        ({}, [20]),
    ],
)
def test_a_batch_has_its_limits(limits: dict[str, int], sizes: list[int] | None) -> None:
    with BatchServer(work_s=0.1) as server:
        texts(go(client_of(server, **limits), questions(20)))
        files = [content for name, content in server.files.items() if name.startswith("file-")]
        assert once_each(server, 20)
    counts = [content.count(b"\n") for content in files]
    assert sum(counts) == 20 and (sizes is None or counts == sizes)
    assert all(len(content) <= limits.get("max_bytes", 200_000_000) for content in files)
    if sizes is None:  # and they are full
        assert all(
            len(content) + len(content) // count > 1000 for content, count in zip(files[:-1], counts, strict=False)
        )


def test_a_line_that_is_larger_than_a_batch_goes_alone() -> None:
    asked = [([Message("user", "x" * 2000)], {"max_tokens": 5}), *questions(3)]
    with BatchServer() as server:
        texts(go(client_of(server, max_bytes=1000), asked))
        assert next(iter(server.files.values())).count(b"\n") == 1


def test_what_is_asked_after_answers_goes_into_another_batch() -> None:
    async def in_waves(client: OpenAIBatchClient) -> list[Response]:
        async def twice(number: int) -> Response:
            first = await client.generate([Message("user", f"Question {number}?")], max_tokens=30)
            return await client.generate([Message("user", f"{number} again, after {first.text}")], max_tokens=30)

        replies = await asyncio.gather(*(twice(number) for number in range(10)))
        await client.close()
        return replies

    with BatchServer(work_s=0.1) as server:
        asyncio.run(in_waves(client_of(server)))
        assert len(server.batches) == 2 and once_each(server, 20)


def test_stragglers_are_waited_for() -> None:
    async def slowly(client: OpenAIBatchClient) -> None:
        tasks = []
        for question in questions(12):
            tasks.append(asyncio.create_task(client.generate(question[0], **question[1])))
            await asyncio.sleep(0.03)
        await asyncio.gather(*tasks)
        await client.close()

    with BatchServer() as server:
        asyncio.run(slowly(client_of(server, quiet_s=0.15)))
        assert len(server.batches) == 1


def test_equal_questions_are_asked_once() -> None:
    with BatchServer() as server:
        replies = go(client_of(server), questions(1) * 10)
        assert len(set(texts(replies))) == 1 and once_each(server, 1)


# lines that fail


def test_lines_that_fail_go_into_the_next_batch() -> None:
    with BatchServer(broken=0.4, garbled=0.1) as server:
        replies = go(client_of(server, max_attempts=30), questions(60))
        assert texts(replies) == texts(online(server, questions(60)))
        sizes = [batch["request_counts"]["total"] for batch in server.batches.values()]
        assert sizes[0] == 60 and sizes == sorted(sizes, reverse=True) and len(sizes) > 3
        assert len(set(server.answered)) == 60
        unreadable = len(server.answered) - 60  # answered, but nobody could know
        assert unreadable == sum(entry["event"] == "finished" for entry in server.log) - 60 < 25


def test_a_line_that_never_succeeds_is_given_up_alone(caplog: pytest.LogCaptureFixture) -> None:
    with BatchServer(broken=0.5) as server:
        replies = go(client_of(server, max_attempts=2), questions(40))
    failed = [reply for reply in replies if not isinstance(reply, Response)]
    assert 2 <= len(failed) <= 20 and {type(reply) for reply in failed} == {NoAnswer}
    assert "expected an answer in 2 batches; seen status 500: broken" in str(failed[0])
    assert "requests got no answer (status 500: broken); they go into a next batch" in caplog.text


@pytest.mark.parametrize("owned_by", ["hosted", "vllm"])
def test_what_can_never_be_answered_is_not_asked_again(owned_by: str) -> None:
    long = ([Message("user", "word " * 200)], {"max_tokens": 5})
    odd = ([Message("user", "odd")], {"regex": "[0-9]{40}", "max_tokens": 5, "schema": None})
    with BatchServer(context_tokens=100, owned_by=owned_by) as server:
        replies = go(client_of(server), [*questions(3), long, odd])
        assert len(server.batches) == 1
    texts(replies[:3])
    assert isinstance(replies[3], ContextOverflow) and replies[3].limit == 100
    assert isinstance(replies[4], RequestRefused)


@pytest.mark.parametrize("end", ["expired"])
def test_what_a_batch_leaves_undone_goes_into_the_next(end: str) -> None:
    with BatchServer(ends=[end, end]) as server:
        replies = go(client_of(server), questions(21))
        sizes = [batch["request_counts"]["total"] for batch in server.batches.values()]
        assert sizes == [21, 11, 6] and once_each(server, 21)
    texts(replies)


def test_a_cancelled_batch_is_not_made_again_by_the_same_command(tmp_path: Path) -> None:
    with BatchServer(ends=["cancelled"]) as server:
        replies = go(kept(tmp_path, client_of(server)), questions(10))
        assert len(server.batches) == 1
        texts(replies[:5])
        assert {str(reply) for reply in replies[5:]} == {
            "batch batch_0: expected it to be worked off; seen it was cancelled; "
            "fix: the same command hands in again what it left"
        }
        texts(go(kept(tmp_path, client_of(server)), questions(10)))
        assert once_each(server, 10)


# answers that are paid for and not handed out


def without_files(batch: dict[str, Any], looks: int = 0) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if not name.endswith("file_id") or name == "input_file_id"}


def late_files(after: int) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    """Which are there after so many looks at a batch that has ended."""
    looks: list[int] = []

    def shown(batch: dict[str, Any], _: int) -> dict[str, Any]:
        looks.extend([1] * (batch["status"] == "completed"))
        return batch if len(looks) > after else without_files(batch)

    return shown


@pytest.mark.parametrize("after", [1, 5])
def test_files_that_come_later_than_the_end_are_waited_for(after: int) -> None:
    with BatchServer(shown=late_files(after)) as server:
        texts(go(client_of(server), questions(5)))
        assert once_each(server, 5) and len(server.batches) == 1


def test_a_file_that_is_cut_in_half_once_is_read_again() -> None:
    left = [0.5]
    with BatchServer(read=lambda content: content[: int(len(content) * (left.pop() if left else 1))]) as server:
        texts(go(client_of(server), questions(9)))
        assert once_each(server, 9) and len(server.batches) == 1


def test_answers_that_never_come_out_are_not_paid_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_following, "_LOOKS_AGAIN", 2)
    with BatchServer(broken=0.2, read=lambda content: content[: len(content) // 2]) as server:
        replies = go(kept(tmp_path, client_of(server)), questions(20))
        paid = len(server.answered)
        assert {type(reply) for reply in replies} == {Response, ClientDown} and len(server.batches) == 1
        (reply, *_) = [str(reply) for reply in replies if not isinstance(reply, Response)]
        assert f"batch batch_0 at {server.base_url}: expected the answers to {paid} requests, which it has, " in reply
        assert "fewer in its files; fix: the same command looks again" in reply
        assert len(requests_in_batches(tmp_path / "batches.sqlite", server.model)) == 20
        server.read, server.broken = (lambda content: content), 0
        texts(go(kept(tmp_path, client_of(server)), questions(20)))
        assert once_each(server, 20) and len(server.batches) == 2  # the second one of lines that failed


def test_a_page_instead_of_a_file_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_following, "_LOOKS_AGAIN", 2)
    with BatchServer(read=lambda content: b"<html>\nbusy\n</html>\n") as server:
        (reply,) = go(kept(tmp_path, client_of(server)), questions(1))
        assert isinstance(reply, ClientDown) and len(server.batches) == 1


ODD_LINES = {
    "status": '{"status_code": 1e999, "body": {}}',
    "digits": '{"status_code": 400, "body": {"error": {"code": "context_length_exceeded", "message": "maximum context '
    f'length is {"9" * 5000}"}}}}}}',
    "number": f'{{"status_code": {"9" * 5000}, "body": {{}}}}',
    "logprobs": '{"status_code": 200, "body": {"choices": [{"message": {"content": "a"}, "logprobs": {"content": '
    f'[{{"token": "a", "logprob": 1{"0" * 400}, "top_logprobs": []}}]}}}}]}}}}',
    "list": '{"status_code": 400, "body": {"error": [{"code": []}]}}',
}


@pytest.mark.parametrize("kind", ODD_LINES)
def test_one_odd_line_costs_no_other_its_answer(kind: str) -> None:
    def read(content: bytes) -> bytes:
        first, *others = content.splitlines()
        key = json.loads(first)["custom_id"]
        odd = f'{{"custom_id": "{key}", "response": {ODD_LINES[kind]}, "error": null}}'.encode()
        return b"\n".join([odd, *others]) + b"\n"

    with BatchServer(read=read) as server:
        asked = [(messages, {**options, "logprobs": 2}) for messages, options in questions(6)]
        replies = go(client_of(server, max_attempts=2), asked)
    odd = [reply for reply in replies if not isinstance(reply, Response)]
    assert len(odd) <= 1 and all(isinstance(reply, NoAnswer | ContextOverflow | RequestRefused) for reply in odd)


def test_counts_that_are_none() -> None:
    def shown(batch: dict[str, Any], _: int) -> dict[str, Any]:
        return {**batch, "request_counts": {"total": "many", "completed": "many", "failed": [3]}, "errors": "none"}

    with BatchServer(shown=shown) as server:
        texts(go(client_of(server), questions(3)))
        assert once_each(server, 3)


def test_no_file_is_read_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_FILE_BYTES", 1000)
    monkeypatch.setattr(batches, "_LINE_BYTES", 1000)
    with BatchServer(read=lambda content: content + b" " * 10_000_000) as server:
        replies = go(kept(tmp_path, client_of(server)), questions(5))
        assert {type(reply) for reply in replies} == {ClientDown}
        assert "in a size to read; seen a reply of more than 0 MB" in str(replies[0])
        server.read = lambda content: content
        texts(go(kept(tmp_path, client_of(server)), questions(5)))
        assert once_each(server, 5)


# batches that fail


def test_bad_lines_fail_alone() -> None:
    errors = [{"code": "invalid_line", "message": "not this one", "line": line} for line in (2, 5)]
    with BatchServer(ends=["failed"], errors=errors) as server:
        replies = go(client_of(server), questions(6))
        assert once_each(server, 4)
    kinds = [type(reply) for reply in replies]
    assert kinds == [Response, RequestRefused, Response, Response, RequestRefused, Response]
    assert "invalid_line: not this one" in str(replies[1])


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ([{"code": "model_not_found", "message": "no model m", "line": None}], "model_not_found: no model m"),
        ([], "no reason"),
        ([{"code": "invalid_line", "message": "all", "line": 99}], "invalid_line: all"),
    ],
)
def test_a_batch_that_is_not_taken_ends_the_run(errors: list[dict[str, Any]], words: str, tmp_path: Path) -> None:
    with BatchServer(ends=["failed"], errors=errors) as server:
        replies = go(kept(tmp_path, client_of(server)), questions(4))
        assert {type(reply) for reply in replies} == {ClientDown}
        assert f"seen {words}; fix: see the reason; the same command hands it in again" in str(replies[0])
        texts(go(kept(tmp_path, client_of(server)), questions(4)))  # which it does
        assert once_each(server, 4)


def test_a_server_that_is_full_gets_less_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    with BatchServer(room=12, work_s=0.02) as server:
        replies = go(client_of(server, max_requests=25), questions(50))
        taken = [one["request_counts"]["total"] for one in server.batches.values() if one["status"] == "completed"]
        assert once_each(server, 50) and max(taken) <= 12
    texts(replies)
    assert "has no room (token_limit_exceeded: Enqueued token limit reached)" in caplog.text


def test_a_server_that_had_no_room_gets_more_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_room, "_LEAST_REFUSALS", 1)
    with BatchServer(room=3, work_s=0.02) as server:

        def shown(batch: dict[str, Any], _: int) -> dict[str, Any]:
            if batch["status"] == "completed":
                server.room = None
            return batch

        server.shown = shown
        texts(go(client_of(server, max_requests=16), questions(60)))
        taken = [one["request_counts"]["total"] for one in server.batches.values() if one["status"] == "completed"]
        assert once_each(server, 60) and taken[:5] == [2, 4, 8, 16, 16]


def test_a_small_batch_that_finds_no_room_is_not_cut_at_once() -> None:
    with BatchServer(room=0, work_s=0.02) as server:

        def shown(batch: dict[str, Any], _: int) -> dict[str, Any]:
            if len(server.batches) == 3:
                server.room = None
            return batch

        server.shown = shown
        texts(go(client_of(server), questions(20)))
        assert [one["request_counts"]["total"] for one in server.batches.values()][-1] == 20


def test_a_server_that_takes_small_files_only() -> None:
    with BatchServer(largest=1500) as server:
        texts(go(client_of(server), questions(30)))
        assert len(server.batches) > 2 and once_each(server, 30)
    with BatchServer(largest=100) as server:
        (reply,) = go(client_of(server), questions(1))
    assert isinstance(reply, RequestRefused) and "File is too large" in str(reply)


# servers that are busy, broken, or without batches


@pytest.mark.parametrize(
    "place", ["POST /v1/files", "POST /v1/batches", "GET /v1/batches/ID", "GET /v1/files/ID/content"]
)
@pytest.mark.parametrize("statuses", [[429], [429, 429, 500], [503], [500, 502]])
def test_a_busy_server_is_waited_for(place: str, statuses: list[int]) -> None:
    with BatchServer(first={place: list(statuses)}, retry_after_s=0.1) as server:
        began = time.monotonic()
        texts(go(client_of(server), questions(5)))
        assert once_each(server, 5) and len(server.batches) == 1
        assert time.monotonic() - began >= 0.1 * statuses.count(429)
        assert server.counts()[place] > len(statuses)


def test_patience_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(batches, "_LONG_PATIENCE_S", 0.3)
    with BatchServer(first={"GET /v1/batches/ID": [500] * 1000}) as server:
        (reply,) = go(client_of(server), questions(1))
    assert isinstance(reply, ClientDown)
    assert "expected an answer; seen status 500: busy; fix: see that the server can be reached" in str(reply)


def test_a_server_without_batches(tmp_path: Path) -> None:
    with ChatServer() as server:
        (reply,) = go(client_of(server), questions(1))
    assert isinstance(reply, ClientDown)
    assert "expected the Batch API (/files and /batches); seen status 404" in str(reply)
    assert "use --client openai:MODEL" in str(reply)


def test_a_wrong_key_shows_at_once() -> None:
    with BatchServer(require_key="sk-another") as server:
        for probe in (True, False):
            replies = go(client_of(server, probe=probe), questions(20))
            assert {type(reply) for reply in replies} == {ClientDown}
            assert "the key in the environment is missing or wrong" in str(replies[0])
        assert not server.batches and server.counts()["received"] == 1


def test_the_key_is_in_no_file_and_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk-" + "0123456789abcdef" * 2
    monkeypatch.setenv("OPENAI_API_KEY", key)
    caplog.set_level("DEBUG")
    with BatchServer(require_key=key, echo_key=True, broken=0.5) as server:
        replies = go(kept(tmp_path, client_of(server, max_attempts=2, probe=True)), mixed())
        assert b"Bearer" in b"".join(server.files.values())  # it was told
    errors = [str(reply) for reply in replies if not isinstance(reply, Response)]
    assert errors and any("[key]" in text for text in errors)
    kept_bytes = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for place in (kept_bytes.decode("latin-1"), caplog.text, *errors):
        assert not [piece for piece in (key[:16], key[8:24], key[-16:]) if piece in place]


@pytest.mark.parametrize("place", ["code", "id", "file"])
def test_the_key_is_cut_out_of_what_is_said_of_batches(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-" + "0123456789abcdef" * 2
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setattr(batches, "_LONG_PATIENCE_S", 0.3)
    errors = [{"code": key, "message": "no", "line": None}] if place == "code" else ()
    with BatchServer(ends=["failed"] if errors else (), errors=errors, lost=[] if errors else [500]) as server:
        if place != "code":
            server.shown = lambda batch, _: {**batch, {"id": "id", "file": "output_file_id"}[place]: f"x-{key}"}
        replies = go(kept(tmp_path, client_of(server)), questions(3))
    assert {type(reply) for reply in replies} == {ClientDown}
    kept_bytes = b"".join(path.read_bytes() for path in tmp_path.iterdir()).decode("latin-1")
    assert not [place for place in (kept_bytes, *map(str, replies)) if key[:16] in place]


# what a server does not take


@pytest.mark.parametrize(("probe", "count"), [(True, 1), (False, 2)])
def test_parameters_that_are_refused_are_left_out(probe: bool, count: int, tmp_path: Path) -> None:
    """Where the first request is asked alone, no batch is lost for it; and nobody has to learn it twice."""
    with BatchServer(refuse=("max_tokens",)) as server:
        replies = go(kept(tmp_path, client_of(server, probe=probe)), questions(12))
        assert texts(replies) == texts(online(server, questions(12)))
        assert len(server.batches) == count and once_each(server, 12)
        texts(go(kept(tmp_path, client_of(server, probe=probe)), questions(12, first=20)))
        assert len(server.batches) == count + 1 and once_each(server, 24)
        assert server.counts()["received"] == (2 if probe else 0)  # with the parameter, and without


def test_a_probe_that_gets_no_answer_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(*_: Any, **__: Any) -> Response:
        raise NoAnswer("server", expected="an answer", seen="status 429", fix="wait")

    monkeypatch.setattr(OpenAIClient, "generate", busy)
    with BatchServer() as server:
        texts(go(client_of(server, probe=True, constraints="json_schema"), mixed()))


# commands that end early


def cut_short(recorder: Recorder, asked: Sequence[Ask], when: Callable[[], bool]) -> None:
    """As after kill -9: the moment comes, and nothing more is written, said or closed."""

    async def until_then() -> None:
        asking = asyncio.create_task(ask_all(recorder, asked))
        end = time.monotonic() + 10
        while not when():
            assert time.monotonic() < end and not asking.done()
            await asyncio.sleep(0.005)

    async def and_no_further() -> None:
        await until_then()
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()

    asyncio.run(and_no_further())


@pytest.mark.parametrize(
    ("hold", "event", "batches_made"),
    [
        ({"uploaded": 5.0}, "uploaded", 1),  # after the upload, before we know of it
        ({"making": 5.0}, "POST /v1/batches", 1),  # after the upload, before a batch is made
        ({"made": 5.0}, "made", 1),  # after it was made, before we know of it
        ({}, "GET /v1/batches/ID", 1),  # while we look at it
    ],
)
def test_a_kill_costs_nothing_whenever_it_comes(
    hold: dict[str, float], event: str, batches_made: int, tmp_path: Path
) -> None:
    with BatchServer(hold=hold, work_s=0.3) as server:
        cut_short(kept(tmp_path, client_of(server)), questions(15), lambda: server.counts()[event] > 0)
        server.hold = {}
        texts(go(kept(tmp_path, client_of(server)), questions(15)))
        assert once_each(server, 15) and len(server.batches) == batches_made
        assert all(batch["metadata"]["evalkit"] for batch in server.batches.values())


def test_a_line_that_is_bad_is_known_by_its_place_in_the_next_command_too(tmp_path: Path) -> None:
    errors = [{"code": "invalid_line", "message": "not this one", "line": 3}]
    with BatchServer(ends=["failed"], errors=errors) as server:
        client = client_of(server, look_every_s=10)
        server.first["GET /v1/batches/ID"] = [429]
        server.retry_after_s = 10
        cut_short(kept(tmp_path, client), questions(20), lambda: server.counts()["GET /v1/batches/ID"] > 0)
        replies = go(kept(tmp_path, client_of(server)), questions(20))
        assert once_each(server, 19)
    assert [number for number, reply in enumerate(replies) if isinstance(reply, RequestRefused)] == [2]


def test_a_batch_that_is_listed_late_is_found_all_the_same(tmp_path: Path) -> None:
    with BatchServer(hold={"made": 5.0}, listed_after_s=1.5) as server:
        client = client_of(server, listed_within_s=3)
        cut_short(kept(tmp_path, client), questions(5), lambda: server.counts()["made"] > 0)
        server.hold = {}
        texts(go(kept(tmp_path, client_of(server, listed_within_s=3)), questions(5)))
        assert once_each(server, 5) and len(server.batches) == 1


def test_a_response_that_is_lost_makes_no_second_batch() -> None:
    """The server makes it, and its answer never comes: no kill, only a broken connection."""
    with BatchServer(hold={"made": 3.0}) as server:
        texts(go(client_of(server, timeout_s=0.5), questions(5)))
        assert once_each(server, 5) and len(server.batches) == 1


@pytest.mark.parametrize("status", [408, 409, 425, 500])
def test_a_making_that_fails_when_all_is_done_makes_no_second_batch(status: int) -> None:
    with BatchServer(lost=[status]) as server:
        texts(go(client_of(server), questions(5)))
        assert once_each(server, 5) and len(server.batches) == 1


def test_a_clear_no_says_nothing_of_an_earlier_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is listed late, and in between the server has too much to do."""
    find = batches.BatchApi.find
    finds: list[int] = []

    async def late(self: batches.BatchApi, *of: Any) -> Any:
        server.first["POST /v1/batches"] = [429] if not finds else []
        finds.append(1)
        return None if len(finds) == 1 else await find(self, *of)

    monkeypatch.setattr(batches.BatchApi, "find", late)
    with BatchServer(lost=[500], retry_after_s=0.05) as server:
        texts(go(client_of(server), questions(5)))
        assert once_each(server, 5) and len(server.batches) == 1


def test_a_list_may_hold_nothing_in_the_place_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    page = batches.BatchApi._page

    async def with_nothing(self: batches.BatchApi, after: dict[str, Any]) -> Any:
        found = await page(self, after)
        found.data.insert(0, None)
        return found

    monkeypatch.setattr(batches.BatchApi, "_page", with_nothing)
    with BatchServer(lost=[500]) as server:
        texts(go(client_of(server), questions(5)))
        assert once_each(server, 5) and len(server.batches) == 1


def test_a_batch_among_many_others_is_found(tmp_path: Path) -> None:
    with BatchServer(hold={"made": 5.0}) as server:
        cut_short(kept(tmp_path, client_of(server)), questions(5), lambda: server.counts()["made"] > 0)
        server.hold = {}
        for number in range(230):  # made since by others
            other = {**server.batches["batch_0"], "id": f"other-{number}", "metadata": None, "input_file_id": "theirs"}
            server.batches[other["id"]] = other
        texts(go(kept(tmp_path, client_of(server)), questions(5)))
        assert once_each(server, 5) and server.counts()["GET /v1/batches"] == 3


def test_a_server_that_keeps_no_metadata_is_searched_by_the_file(tmp_path: Path) -> None:
    with BatchServer(hold={"made": 5.0}) as server:
        cut_short(kept(tmp_path, client_of(server)), questions(5), lambda: server.counts()["made"] > 0)
        server.hold = {}
        server.batches["batch_0"]["metadata"] = None
        texts(go(kept(tmp_path, client_of(server)), questions(5)))
        assert once_each(server, 5)


def test_a_file_that_became_no_batch_is_deleted(tmp_path: Path) -> None:
    with BatchServer(hold={"making": 5.0}) as server:
        cut_short(kept(tmp_path, client_of(server)), questions(5), lambda: server.counts()["POST /v1/batches"] > 0)
        server.hold = {}
        texts(go(kept(tmp_path, client_of(server)), questions(5)))
        assert "file-0" not in server.files and "file-1" in server.files


def test_answers_that_nobody_asks_for_any_more_are_recorded(tmp_path: Path) -> None:
    with BatchServer(work_s=0.3) as server:
        cut_short(kept(tmp_path, client_of(server)), questions(20), lambda: server.counts()["made"] > 0)
        time.sleep(0.5)
        texts(go(kept(tmp_path, client_of(server)), questions(1)))
        with closing(sqlite3.connect(tmp_path / "calls.sqlite")) as database:
            rows = database.execute("SELECT count(*), sum(paid = 2) FROM answers").fetchone()
        assert rows == (20, 20) and once_each(server, 20)
        texts(go(ReplayClient(tmp_path / "calls.sqlite"), questions(20)))


def test_a_kill_between_recording_and_the_ledger_costs_nothing(tmp_path: Path) -> None:
    with BatchServer() as server:
        client = client_of(server)
        recorder = kept(tmp_path, client)

        def record(answers: Sequence[tuple[KeyedRequest, Recorded]]) -> None:
            recorder.record_batched(answers)
            recorded.append(len(answers))
            raise asyncio.CancelledError  # nothing after this happens

        recorded: list[int] = []
        client.keep_in(tmp_path / "batches.sqlite", record)
        cut_short(recorder, questions(8), lambda: bool(recorded))
        assert len(requests_in_batches(tmp_path / "batches.sqlite", server.model)) == 8
        texts(go(kept(tmp_path, client_of(server)), questions(9)))
        assert once_each(server, 9)
        assert len(requests_in_batches(tmp_path / "batches.sqlite", server.model)) == 0


def test_leaving_says_what_stays_and_the_next_command_fetches_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def leave(client: OpenAIBatchClient, recorder: Recorder) -> list[Any]:
        asking = asyncio.create_task(ask_all(recorder, questions(6)))
        while not server.batches:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        client.finish()
        replies = await asyncio.wait_for(asking, 1)
        await recorder.close()
        return replies

    with BatchServer(work_s=0.5) as server:
        client = client_of(server)
        replies = asyncio.run(leave(client, kept(tmp_path, client)))
        assert {type(reply) for reply in replies} == {NoAnswer}
        told = f"{server.base_url} goes on with 6 requests in batches (1); the same command fetches their answers"
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [told]
        texts(go(kept(tmp_path, client_of(server)), questions(6)))
        assert once_each(server, 6)


def test_what_was_only_collected_is_not_handed_in_on_leaving() -> None:
    async def leave(client: OpenAIBatchClient) -> None:
        asking = asyncio.create_task(ask_all(client, questions(6)))
        await asyncio.sleep(0.05)
        await client.close()
        await asyncio.wait_for(asking, 1)

    with BatchServer() as server:
        asyncio.run(leave(client_of(server, quiet_s=5)))
        assert not server.files


def test_another_account_s_key_does_not_ask_everything_again(tmp_path: Path) -> None:
    with BatchServer(work_s=0.3) as server:
        cut_short(kept(tmp_path, client_of(server)), questions(4), lambda: server.counts()["GET /v1/batches/ID"] > 0)
        mine = server.batches.pop("batch_0")
        replies = go(kept(tmp_path, client_of(server)), questions(4))
        assert {type(reply) for reply in replies} == {ClientDown}
        assert "batch batch_0, which this run handed in; seen status 404" in str(replies[0])
        assert "use the key that handed it in" in str(replies[0])
        server.batches["batch_0"] = mine
        texts(go(kept(tmp_path, client_of(server)), questions(4)))
        assert once_each(server, 4)


def test_who_asks_again_after_an_error_is_answered_by_the_old_batch(tmp_path: Path) -> None:
    async def twice(client: Any) -> list[Any]:
        failed = await ask_all(client, questions(4))
        server.batches["batch_0"] = hidden.pop()
        replies = await ask_all(client, questions(4))
        await client.close()
        return [failed, replies]

    with BatchServer() as server:
        hidden: list[dict[str, Any]] = []

        def shown(batch: dict[str, Any], _: int) -> dict[str, Any]:
            if batch["status"] == "completed" and not tried:
                tried.append(1)
                hidden.append(server.batches.pop("batch_0"))
                return {**batch, "status": "in_progress"}
            return batch

        tried: list[int] = []
        server.shown = shown
        failed, replies = asyncio.run(twice(kept(tmp_path, client_of(server))))
        assert {type(reply) for reply in failed} == {ClientDown}
        texts(replies)
        assert once_each(server, 4) and len(server.batches) == 1


def test_the_first_request_is_waited_for_on_leaving(tmp_path: Path) -> None:
    """It is sent, and will be paid for."""

    async def leave(client: OpenAIBatchClient, recorder: Recorder) -> list[Any]:
        asking = asyncio.create_task(ask_all(recorder, questions(3)))
        while not server.counts()["received"]:
            await asyncio.sleep(0.01)
        client.finish()
        await recorder.settle()
        replies = await asyncio.wait_for(asking, 1)
        await recorder.close()
        return replies

    with BatchServer(delay_s=0.5) as server:
        client = client_of(server, probe=True)
        replies = asyncio.run(leave(client, kept(tmp_path, client)))
        assert [type(reply) for reply in replies] == [Response, NoAnswer, NoAnswer] and not server.files
        texts(go(kept(tmp_path, client_of(server, probe=True)), questions(3)))
        assert once_each(server, 3)


def test_leaving_sends_no_first_request_again(tmp_path: Path) -> None:
    async def leave(client: OpenAIBatchClient) -> list[Any]:
        asking = asyncio.create_task(ask_all(client, questions(3)))
        while not server.counts()["received"]:
            await asyncio.sleep(0.01)
        await client.close()
        return await asyncio.wait_for(asking, 1)

    with BatchServer(delay_s=0.2, faults=1, kinds=("500",)) as server:
        replies = asyncio.run(leave(client_of(server, probe=True)))
        assert {type(reply) for reply in replies} == {NoAnswer} and server.counts()["received"] == 1


def test_another_name_of_the_server_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with BatchServer(work_s=0.3) as server:
        cut_short(kept(tmp_path, client_of(server)), questions(4), lambda: server.counts()["GET /v1/batches/ID"] > 0)
        other = server.base_url.replace("127.0.0.1", "localhost")
        texts(go(kept(tmp_path, client_of(server, base_url=other)), questions(1, first=9)))
    assert f"4 requests of {server.model} are in batches at {server.base_url}; asking at {other}" in caplog.text


def test_a_state_that_nobody_knows_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with BatchServer(shown=lambda batch, looks: {**batch, "status": "paused"} if looks < 5 else batch) as server:
        texts(go(client_of(server), questions(2)))
        assert once_each(server, 2)
    assert caplog.text.count("batch 1 (batch_0) is in a state that the protocol does not know") == 1


def test_a_batch_that_outlasts_its_window_is_told_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_following, "_LATE_S", -86400.0)
    with BatchServer(work_s=0.3) as server:
        texts(go(client_of(server), questions(2)))
    assert caplog.text.count("has not ended, and was to be worked off within 24h") == 1


def test_models_and_servers_of_one_ledger_are_kept_apart(tmp_path: Path) -> None:
    with BatchServer(work_s=0.3) as server, BatchServer(model="another") as other:
        cut_short(kept(tmp_path, client_of(server)), questions(4), lambda: server.counts()["made"] > 0)
        texts(go(kept(tmp_path, client_of(other)), questions(3)))
        assert once_each(other, 3)
        texts(go(kept(tmp_path, client_of(server)), questions(4)))
        assert once_each(server, 4)


# options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_requests", 0),
        ("max_bytes", 10),
        ("quiet_s", 0),
        ("look_every_s", "often"),
        ("max_attempts", 1.5),
        ("concurrency", 0),
        ("probe", "no"),
        ("window", 24),
        ("listed_within_s", -1),
    ],
)
def test_options_that_cannot_be(option: str, value: Any) -> None:
    with pytest.raises(BadConfig, match=f"{option} of client 'openai-batch': expected .*; seen "):
        create("clients", "openai-batch", model="m", base_url="http://localhost:1/v1", **{option: value})


def test_one_server_only() -> None:
    with pytest.raises(BadConfig, match="expected one server, which keeps the batches; seen 2 URLs"):
        OpenAIBatchClient("m", base_url=["http://a:1/v1", "http://b:1/v1"])


def test_making_one_reaches_nobody_and_writes_nothing(tmp_path: Path) -> None:
    client = OpenAIBatchClient("m", base_url="http://localhost:1/v1")
    client.keep_in(tmp_path / "batches.sqlite", lambda answers: None)
    assert list(tmp_path.iterdir()) == []
    asyncio.run(client.close())


def test_a_file_is_what_the_protocol_says() -> None:
    with BatchServer() as server:
        texts(go(client_of(server, extra_body={"top_p": 0.9}, temperature=0.5), mixed()))
        (name,) = server.names.values()
        lines = [json.loads(line) for line in server.files["file-0"].splitlines()]
        assert name.startswith("evalkit-") and name.endswith(".jsonl")
        assert all(set(line) == {"custom_id", "method", "url", "body"} for line in lines)
        assert {line["url"] for line in lines} == {"/v1/chat/completions"}
        assert {(line["body"]["model"], line["body"]["top_p"]) for line in lines} == {("stand-in", 0.9)}
        assert {line["body"]["temperature"] for line in lines} == {0.5}
        assert server.batches["batch_0"]["completion_window"] == "24h"
        assert server.files["file-0"].isascii()  # no character that some reader takes for the end of a line


def test_who_asks_late_hears_what_became_of_an_earlier_command_s_batch(tmp_path: Path) -> None:
    """The batch is somebody else's by now: what was in it is not asked again, whenever it is asked for."""

    async def first_another_then_these(client: Any) -> list[Any]:
        (other,) = await ask_all(client, questions(1, first=50))
        assert isinstance(other, Response)
        replies = await ask_all(client, questions(4))
        await client.close()
        return replies

    with BatchServer(work_s=0.3) as server:
        cut_short(kept(tmp_path, client_of(server)), questions(4), lambda: server.counts()["GET /v1/batches/ID"] > 0)
        mine = server.batches.pop("batch_0")
        replies = asyncio.run(first_another_then_these(kept(tmp_path, client_of(server))))
        assert {type(reply) for reply in replies} == {ClientDown}
        server.batches["batch_0"] = mine
        texts(asyncio.run(first_another_then_these(kept(tmp_path, client_of(server)))))
        assert once_each(server, 5)


@pytest.mark.parametrize("moment", ["write", "uploaded", "begins", "created", "ended", "learn"])
def test_a_full_disk_is_heard_of_by_all_who_wait(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StorageError("batches.sqlite", expected="a file that can be written", seen="disk full", fix="free space")

    with BatchServer(refuse=("max_tokens",) if moment == "learn" else ()) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, moment, full)
            replies = go(kept(tmp_path, client_of(server)), questions(5))
        assert {type(reply) for reply in replies} == {StorageError}
        texts(go(kept(tmp_path, client_of(server)), questions(5)))
        assert once_each(server, 5)
