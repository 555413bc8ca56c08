"""Servers that are busy, broken or without batches; finding a batch again; what is said of keys."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import ClientDown
from evalkit.llm.clients.batch import api as batches
from evalkit.records import Response
from tests.support.batch_client import (
    client_of,
    cut_short,
    go,
    kept,
    mixed,
    once_each,
    questions,
    texts,
)
from tests.support.batch_server import BatchServer
from tests.support.servers import ChatServer


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
    assert "expected an answer; seen status 500: busy; fix: check that the server can be reached" in str(reply)


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
            assert "set the right API key in the environment; it is missing or wrong" in str(replies[0])
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
