"""Recording and replaying a client's answers."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import BadConfig, BadFile, ClientError, MissingFile, NotRecorded
from evalkit.llm.clients.recorder import Recorder
from evalkit.llm.clients.replay import ReplayClient
from evalkit.records import Message, Response
from evalkit.registry import create

ASK = [Message("system", "s"), Message("user", "how many?")]


class Counting:
    """A live client that counts what it is asked."""

    def __init__(self, name: str = "model-a", fails: bool = False) -> None:
        self.name, self.fails, self.asked = name, fails, 0

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        self.asked += 1
        await asyncio.sleep(0.01)
        if self.fails:
            raise ClientError("server", expected="an answer", seen="none", fix="start it")
        return Response(f"{messages[-1].content} {self.asked}", logprobs=({"yes": -0.1},), prompt_tokens=3)


def ask(client: Recorder | ReplayClient, messages: Sequence[Message] = ASK, **options: Any) -> Response:
    return asyncio.run(client.generate(messages, **({"max_tokens": 5} | options)))


def test_records_once_and_replays_the_same(tmp_path: Path) -> None:
    live = Counting()
    recorder = Recorder(tmp_path / "answers.sqlite", live)
    first = ask(recorder)
    assert ask(recorder) == first and live.asked == 1
    replay = create("clients", "replay", path=str(tmp_path / "answers.sqlite"))
    assert ask(replay) == first
    assert replay.name == "model-a"
    resumed = Recorder(tmp_path / "answers.sqlite", live)
    assert ask(resumed) == first and live.asked == 1


def test_equal_requests_at_the_same_time_are_asked_once(tmp_path: Path) -> None:
    live = Counting()
    recorder = Recorder(tmp_path / "answers.sqlite", live)

    async def many() -> list[Response]:
        return await asyncio.gather(*(recorder.generate(ASK, max_tokens=5) for _ in range(10)))

    assert len({response.text for response in asyncio.run(many())}) == 1 == live.asked


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"max_tokens": 6},
        {"logprobs": 1},
        {"choices": ("yes", "no")},
        {"schema": {"type": "array"}},
        {"messages": ASK[1:]},
        {"messages": [Message("user", "s"), ASK[1]]},
    ],
)
def test_another_request_is_not_recorded(tmp_path: Path, change: dict[str, Any]) -> None:
    ask(Recorder(tmp_path / "a.sqlite", Counting()))
    with pytest.raises(NotRecorded, match=r"expected an answer of model-a recorded in .*a\.sqlite; seen none for"):
        ask(ReplayClient(tmp_path / "a.sqlite"), **change)


def test_a_failed_answer_is_not_recorded(tmp_path: Path) -> None:
    live = Counting(fails=True)
    recorder = Recorder(tmp_path / "a.sqlite", live)
    for _ in range(2):
        with pytest.raises(ClientError, match="start it"):
            ask(recorder)
    assert live.asked == 2
    live.fails = False
    assert ask(recorder).text == "how many? 3"


def test_models_of_one_file_are_kept_apart(tmp_path: Path) -> None:
    for name in ("model-a", "model-b"):
        ask(Recorder(tmp_path / "a.sqlite", Counting(name)))
    with pytest.raises(BadConfig, match="expected one of the recorded models: model-a, model-b; seen no model given"):
        ReplayClient(tmp_path / "a.sqlite")
    assert ReplayClient(tmp_path / "a.sqlite", model="model-b").name == "model-b"
    with pytest.raises(BadConfig, match="seen 'model-c'"):
        ReplayClient(tmp_path / "a.sqlite", model="model-c")


def test_what_is_no_recording(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="give the path of a recording, or record one first"):
        ReplayClient(tmp_path / "none.sqlite")
    (tmp_path / "text").write_text("not a database, but long enough to be looked at " * 50)
    with pytest.raises(BadFile, match="a recording made by the replay client"):
        ReplayClient(tmp_path / "text")
    with pytest.raises(BadFile):
        Recorder(tmp_path / "text", Counting())
    sqlite3.connect(tmp_path / "other.sqlite").execute("CREATE TABLE t (x)").connection.close()
    with pytest.raises(BadFile, match="no such table"):
        ReplayClient(tmp_path / "other.sqlite")


def test_every_answer_is_on_disk_at_once_and_a_replay_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    recorder = Recorder(path, Counting())
    ask(recorder)  # not closed: as after a crash
    reader = ReplayClient(path)
    assert ask(reader).text == "how many? 1"
    asyncio.run(reader.close())
    asyncio.run(recorder.close())
    path.chmod(0o444)
    before = path.read_bytes()
    ask(ReplayClient(path))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.sqlite"]


def test_a_failure_that_nobody_waits_for_any_more_makes_no_noise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def cancelled() -> None:
        recorder = Recorder(tmp_path / "a.sqlite", Counting(fails=True))
        waiting = asyncio.create_task(recorder.generate(ASK, max_tokens=5))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0.05)
        await recorder.close()

    asyncio.run(cancelled())
    gc.collect()
    assert "never retrieved" not in caplog.text
