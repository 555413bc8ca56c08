"""Commands that end early: no batch is submitted twice, and no answer is lost."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import ClientDown, NoAnswer, RequestRefused, StorageError
from evalkit.llm.accounting.answer_store import KeyedRequest, Recorded
from evalkit.llm.clients.batch.client import OpenAIBatchClient
from evalkit.llm.clients.batch.ledger import Ledger, requests_in_batches
from evalkit.llm.clients.recorder import Recorder
from evalkit.llm.clients.replay import ReplayClient
from evalkit.records import Response
from tests.support.batch_client import (
    ask_all,
    client_of,
    cut_short,
    go,
    kept,
    once_each,
    questions,
    texts,
)
from tests.support.batch_server import BatchServer


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
        told = f"{server.base_url} keeps working on 6 requests in batches (1); the same command fetches their answers"
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
        assert "batch batch_0, which this run submitted; seen status 404" in str(replies[0])
        assert "use the API key that submitted it" in str(replies[0])
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


def test_another_name_of_the_server_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with BatchServer(work_s=0.3) as server:
        cut_short(kept(tmp_path, client_of(server)), questions(4), lambda: server.counts()["GET /v1/batches/ID"] > 0)
        other = server.base_url.replace("127.0.0.1", "localhost")
        texts(go(kept(tmp_path, client_of(server, base_url=other)), questions(1, first=9)))
    assert f"4 requests of {server.model} are in batches at {server.base_url}; this command uses {other}" in caplog.text


def test_models_and_servers_of_one_ledger_are_kept_apart(tmp_path: Path) -> None:
    with BatchServer(work_s=0.3) as server, BatchServer(model="another") as other:
        cut_short(kept(tmp_path, client_of(server)), questions(4), lambda: server.counts()["made"] > 0)
        texts(go(kept(tmp_path, client_of(other)), questions(3)))
        assert once_each(other, 3)
        texts(go(kept(tmp_path, client_of(server)), questions(4)))
        assert once_each(server, 4)


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
