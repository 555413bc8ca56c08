"""The language model of a run: recorded in its folder and in a shared file, asked once, replayed alone."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from evalkit.config.run_config import RunConfig
from evalkit.llm.session import RECORDING, open_client
from evalkit.pipeline.stages import run
from evalkit.records import Message
from evalkit.store.run_store import RunStore
from tests.support.servers import ChatServer
from tests.support.word_features import collected

FEATURES = 4


def go(folder: Path, client: str, *, explainer: str = "default", **options: Any) -> pd.DataFrame:
    """Explain and score in a folder; the judgements."""
    parts = {"explainers": (explainer,), "judges": ("llm",), "controls": ("shuffled",)}
    store, config = collected(folder, FEATURES, client=client, **parts, **options)
    store.close()
    run(config, folder, stages=("explain", "score"))
    with RunStore.open(folder) as store:
        return store.frames().judgements


def live(folder: Path, server: ChatServer, **options: Any) -> pd.DataFrame:
    return go(folder, f"openai:{server.model}", client_options={"base_url": server.base_url}, **options)


def rows(path: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT key, response, seconds FROM answers ORDER BY key").fetchall()


def paid(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT count(*) FROM answers WHERE paid").fetchone()[0])


def test_two_runs_that_share_a_file_ask_once(tmp_path: Path) -> None:
    cache = tmp_path / "shared" / "answers.sqlite"
    with ChatServer() as server:
        first = live(tmp_path / "one", server, cache=cache)
        sent = server.counts()["received"]
        second = live(tmp_path / "two", server, cache=cache)
        assert server.counts()["received"] == sent == FEATURES * (1 + 2 * 2 * 4)  # the scores of shuffled ones too
    pd.testing.assert_frame_equal(first, second)
    files = [tmp_path / "one" / RECORDING, tmp_path / "two" / RECORDING, cache]
    assert rows(files[0]) == rows(files[1]) == rows(files[2]) and len(rows(cache)) == sent
    assert [paid(file) for file in files] == [sent, 0, sent]
    with RunStore.open(tmp_path / "two") as store:
        assert [asked.calls for asked in store.asked()] == [0]  # it cost nothing


def test_both_files_replay_the_whole_run_alone(tmp_path: Path) -> None:
    cache = tmp_path / "answers.sqlite"
    with ChatServer() as server:
        first = live(tmp_path / "one", server, cache=cache)
    for number, file in enumerate((tmp_path / "one" / RECORDING, cache)):
        copy = shutil.copy(file, tmp_path / f"copy-{number}.sqlite")
        before = copy.read_bytes()
        again = go(tmp_path / f"replayed-{number}", f"replay:{copy}")
        pd.testing.assert_frame_equal(again, first)
        assert copy.read_bytes() == before
        assert not (tmp_path / f"replayed-{number}" / RECORDING).exists()


@pytest.mark.parametrize("lost", ["cache", "folder"])
def test_a_crash_between_the_two_files_heals(lost: str, tmp_path: Path) -> None:
    """One of them lacks some answers that the other one has: they are in both afterwards, and nobody is asked."""
    folder, cache = tmp_path / "one", tmp_path / "answers.sqlite"
    with ChatServer() as server:
        first = live(folder, server, cache=cache)
        sent = server.counts()["received"]
        whole = rows(cache)
        with closing(sqlite3.connect(cache if lost == "cache" else folder / RECORDING)) as database, database:
            database.execute("DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY key LIMIT 9)")
        with closing(sqlite3.connect(folder / "records.sqlite")) as database, database:
            for table in ("explanations", "scores", "judgements"):
                database.execute(f"DELETE FROM {table}")
        again = live(folder, server, cache=cache)
        assert server.counts()["received"] == sent
    pd.testing.assert_frame_equal(again, first)
    assert rows(cache) == rows(folder / RECORDING) == whole


def test_a_file_that_comes_later_gets_what_is_there(tmp_path: Path) -> None:
    with ChatServer() as server:
        live(tmp_path / "one", server)
        sent = server.counts()["received"]
        live(tmp_path / "one", server, cache=tmp_path / "answers.sqlite")
        live(tmp_path / "two", server, cache=tmp_path / "answers.sqlite")
        assert server.counts()["received"] == sent
    assert paid(tmp_path / "answers.sqlite") == 0  # paid for in the first run's folder


def test_another_temperature_is_another_model(tmp_path: Path) -> None:
    with ChatServer() as server:
        options = {"base_url": server.base_url}
        cold = go(tmp_path / "run", "openai:stand-in", client_options=options)
        sent = server.counts()["received"]
        warm = go(tmp_path / "run", "openai:stand-in", client_options={**options, "temperature": 0.7})
        assert server.counts()["received"] > sent
    assert set(cold["judge"]) == {"llm@stand-in"}
    assert set(warm["judge"]) == {"llm@stand-in", "llm@stand-in;temperature=0.7"}


def test_ctrl_c_waits_for_what_was_sent_and_not_for_what_waits_for_its_turn(tmp_path: Path) -> None:
    """Ten seconds apart by the limit: half a minute for what had not been sent yet."""

    async def ask_until_cancelled(config: RunConfig, store: RunStore) -> None:
        async with open_client(config, store) as client:
            asked = (client.generate([Message("user", f"{n}?")], max_tokens=5) for n in range(4))
            await asyncio.gather(*asked)

    async def interrupted(config: RunConfig, store: RunStore) -> float:
        asking = asyncio.create_task(ask_until_cancelled(config, store))
        while not server.counts()["received"]:
            await asyncio.sleep(0.02)
        began = time.monotonic()
        asking.cancel()  # as asyncio does on Ctrl-C
        with pytest.raises(asyncio.CancelledError):
            await asking
        return time.monotonic() - began

    with ChatServer(delay_s=1.0) as server:
        settings = {"base_url": server.base_url, "requests_per_minute": 6}
        store, config = collected(tmp_path / "run", 2, client=f"openai:{server.model}", client_options=settings)
        with store:
            assert asyncio.run(interrupted(config, store)) < 8
        assert server.counts()["received"] == server.counts()["finished"] == 1
    assert len(rows(tmp_path / "run" / RECORDING)) == 1
