"""The first request of every form, sent without a batch."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import NoAnswer
from evalkit.llm.clients.batch.client import OpenAIBatchClient
from evalkit.llm.clients.openai import OpenAIClient
from evalkit.llm.clients.recorder import Recorder
from evalkit.records import Response
from tests.support.batch_client import (
    ask_all,
    client_of,
    go,
    kept,
    mixed,
    once_each,
    online,
    questions,
    texts,
)
from tests.support.batch_server import BatchServer


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
