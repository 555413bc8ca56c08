"""How large batches are at servers that are full or take small files only."""

from __future__ import annotations

from typing import Any

import pytest

from evalkit.errors import RequestRefused
from evalkit.llm.clients.batch import sizing as batch_room
from tests.support.batch_client import (
    client_of,
    go,
    once_each,
    questions,
    texts,
)
from tests.support.batch_server import BatchServer


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
