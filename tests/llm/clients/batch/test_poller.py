"""What becomes of a batch's lines: answers, failures, files that are late, cut or odd, and states."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import ClientDown, ContextOverflow, NoAnswer, RequestRefused
from evalkit.llm.clients.batch import api as batches
from evalkit.llm.clients.batch import poller as batch_following
from evalkit.llm.clients.batch.ledger import requests_in_batches
from evalkit.records import Message, Response
from tests.support.batch_client import (
    client_of,
    go,
    kept,
    once_each,
    online,
    questions,
    texts,
)
from tests.support.batch_server import BatchServer


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
    assert "requests got no answer (status 500: broken); retrying in another batch" in caplog.text


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
            "batch batch_0: expected it to be completed; seen it was cancelled at the server; "
            "fix: run the same command again to submit the requests without an answer again"
        }
        texts(go(kept(tmp_path, client_of(server)), questions(10)))
        assert once_each(server, 10)


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
        assert f"batch batch_0 at {server.base_url}: expected answers to the {paid} requests that the " in reply
        assert "fewer in its files; fix: run the same command again later" in reply
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
        assert "of a readable size; seen a reply of more than 0 MB" in str(replies[0])
        server.read = lambda content: content
        texts(go(kept(tmp_path, client_of(server)), questions(5)))
        assert once_each(server, 5)


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
        assert f"seen {words}; fix: see the reason; the same command submits it again" in str(replies[0])
        texts(go(kept(tmp_path, client_of(server)), questions(4)))  # which it does
        assert once_each(server, 4)


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
    assert caplog.text.count("has not ended, though its window was 24h") == 1
