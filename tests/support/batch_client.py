"""A quick batch client, questions for it, and what its tests ask of the replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evalkit.llm.clients.batch.client import OpenAIBatchClient
from evalkit.llm.clients.openai import OpenAIClient
from evalkit.llm.clients.recorder import Recorder
from evalkit.records import JudgeItem, Message, Response
from scorers.judges.llm.judge import list_prompt, list_schema, single_prompt
from tests.support.batch_server import BatchServer
from tests.support.servers import ChatServer

WHALES = [JudgeItem("a whale swam by"), JudgeItem("the bakery was shut"), JudgeItem("two whale bones")]


LIST: dict[str, Any] = {"schema": list_schema(3), "seed": 1, "max_tokens": 40}


SINGLE: dict[str, Any] = {"choices": ("yes", "no"), "logprobs": 10, "seed": 2, "max_tokens": 1}


Ask = tuple[list[Message], dict[str, Any]]


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


def kept(folder: Path, client: OpenAIBatchClient) -> Recorder:
    """With recording and ledger in a folder, as in a run."""
    folder.mkdir(exist_ok=True)
    recorder = Recorder(folder / "calls.sqlite", client)
    client.keep_in(folder / "batches.sqlite", recorder.record_batched)
    return recorder


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
