"""The batch client gives the replies, names and keys of the client ``openai``; limits and options."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import BadConfig
from evalkit.llm.clients.batch.client import OpenAIBatchClient
from evalkit.llm.clients.openai import OpenAIClient
from evalkit.llm.clients.recorder import Recorder
from evalkit.records import Message, Response
from evalkit.registry import create
from tests.support.batch_client import (
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
from tests.support.servers import ChatServer


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
