"""Whole runs that ask in batches: the records of a run that asks at once, at another price, and whatever kill -9 does.

The commands that are killed are processes of their own; what was answered stands in the server's log.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from evalkit.errors import BudgetSpent
from evalkit.llm.session import BATCHES, RECORDING
from evalkit.pipeline.stages import run
from evalkit.store.run_store import RunStore
from tests.support.batch_server import BatchServer
from tests.support.processes import Command
from tests.support.word_features import collected

FEATURES = 4
CALLS = FEATURES * (1 + 2 * 2 * 4)
QUICK = {"quiet_s": 0.2, "look_every_s": 0.05, "listed_within_s": 0.5}
PRICES = '["stand-in"]\nprompt = 1.0\ncompletion = 4.0\nbatch_discount = 0.5\n'


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    while Command.started_ones:
        process = Command.started_ones.pop().process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def go(folder: Path, server: BatchServer, client: str = "openai-batch", count: int = FEATURES, **options: Any) -> Any:
    """Explain and score in a folder; its frames."""
    settings = {"base_url": server.base_url, **(QUICK if client == "openai-batch" else {})}
    settings |= options.pop("client_options", {})
    store, config = collected(
        folder,
        count,
        client=f"{client}:{server.model}",
        client_options=settings,
        explainers=("default",),
        judges=("llm",),
        controls=("shuffled",),
        **options,
    )
    store.close()
    run(config, folder, stages=("explain", "score"))
    with RunStore.open(folder) as store:
        return store.frames()


def rows(folder: Path) -> list[tuple[Any, ...]]:
    query = "SELECT key, model, request, response, prompt_tokens, completion_tokens FROM answers ORDER BY key"
    with closing(sqlite3.connect(folder / RECORDING)) as database:
        return database.execute(query).fetchall()


def paid(folder: Path) -> Counter[int]:
    with closing(sqlite3.connect(folder / RECORDING)) as database:
        return Counter(dict(database.execute("SELECT paid, count(*) FROM answers GROUP BY paid").fetchall()))


def test_a_run_in_batches_is_the_run_that_asks_at_once(tmp_path: Path) -> None:
    with BatchServer(work_s=0.1) as server:
        batched = go(tmp_path / "batched", server)
        sizes = [batch["request_counts"]["total"] for batch in server.batches.values()]
        assert len(sizes) == 2 and sum(sizes) == CALLS - 2  # a batch for each stage, a probe for each form
        assert len(server.answered) == CALLS == len(set(server.answered))
        online = go(tmp_path / "online", server, client="openai")
    assert rows(tmp_path / "batched") == rows(tmp_path / "online")
    assert paid(tmp_path / "batched") == {1: 2, 2: CALLS - 2} and paid(tmp_path / "online") == {1: CALLS}
    pd.testing.assert_frame_equal(batched.judgements, online.judgements)
    pd.testing.assert_frame_equal(batched.explanations, online.explanations)


def test_either_client_goes_on_where_the_other_stopped(tmp_path: Path) -> None:
    with BatchServer() as server:
        for limit, client in ((3, "openai-batch"), (20, "openai"), (None, "openai-batch")):
            try:
                frames = go(tmp_path / "run", server, client=client, max_calls=limit)
            except ExceptionGroup as group:
                assert group.subgroup(BudgetSpent) is not None
                assert sum(paid(tmp_path / "run").values()) == limit
        assert len(server.answered) == CALLS == len(set(server.answered))
    assert frames.features["status"].eq("ok").all()
    assert frames.judgements["match"].notna().all()


def test_what_cannot_be_read_is_asked_again_in_a_second_wave(tmp_path: Path) -> None:
    with BatchServer(spoiled=0.4, seed=2) as server:
        frames = go(tmp_path / "run", server, count=8, client_options={"probe": False})
        first, again, *_ = [batch["request_counts"]["total"] for batch in server.batches.values()]
        answered = [entry["event"] for entry in server.log if entry["event"] in ("finished", "fault:wrong_json")]
    assert first == 8 and answered[:8].count("fault:wrong_json") == again > 2
    assert len(frames.judgements) and frames.judgements["match"].notna().mean() > 0.7


def test_more_features_than_are_in_flight_elsewhere_go_into_one_batch(tmp_path: Path) -> None:
    with BatchServer() as server:
        go(tmp_path / "run", server, count=80, scorers=("detection",), client_options={"probe": False})
        sizes = [batch["request_counts"]["total"] for batch in server.batches.values()]
    assert sizes[0] == 80 and len(sizes) == 2


def test_batches_cost_what_they_cost(tmp_path: Path) -> None:
    folder, prices = tmp_path / "run", tmp_path / "prices.toml"
    prices.write_text(PRICES)
    with BatchServer() as server:
        with pytest.raises(ExceptionGroup) as caught:
            go(folder, server, prices=prices, max_cost=0.003)
        assert caught.value.subgroup(BudgetSpent) is not None
        whole, batched = costs(folder)
        assert 0 < whole / 2 <= cost(folder) <= 0.003 + 0.001  # the probe was reckoned at half its price
        go(folder, server, prices=prices, max_cost=1.0)
        whole, batched = costs(folder)
        assert cost(folder) == pytest.approx(whole - batched / 2) and batched > 0.8 * whole
        before = len(server.answered)
        go(folder, server, client="openai", prices=prices)  # which has nothing left to ask
        assert len(server.answered) == before and cost(folder) == pytest.approx(whole - batched / 2)


def costs(folder: Path) -> tuple[float, float]:
    """What all answers would cost at the list price, and those of batches of it."""
    query = (
        "SELECT sum(prompt_tokens + 4 * completion_tokens), sum((prompt_tokens + 4 * completion_tokens) * (paid = 2)) "
    )
    with closing(sqlite3.connect(folder / RECORDING)) as database:
        whole, batched = database.execute(query + "FROM answers").fetchone()
    return whole / 1e6, batched / 1e6


def cost(folder: Path) -> float:
    with RunStore.open(folder) as store:
        (asked,) = store.asked()
    assert asked.cost is not None
    return asked.cost


def test_a_shared_file_gets_the_answers_too(tmp_path: Path) -> None:
    cache = tmp_path / "shared.sqlite"
    with BatchServer() as server:
        go(tmp_path / "one", server, cache=cache)
        before = len(server.answered)
        go(tmp_path / "two", server, cache=cache)
        assert len(server.answered) == before == CALLS and len(server.batches) == 2
    assert rows(tmp_path / "one") == rows(tmp_path / "two") and paid(tmp_path / "two") == {0: CALLS}


# kill -9 and Ctrl-C, on real commands


def command(folder: Path, server: BatchServer, client: str = "openai-batch") -> Command:
    options = QUICK if client == "openai-batch" else {}
    settings = [part for key, value in options.items() for part in ("--client-option", f"{key}={value}")]
    return Command(
        *("explain", folder, "--explainer", "default", "--client", f"{client}:{server.model}"),
        *("--base-url", server.base_url, *settings),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store, _ = collected(tmp_path / "run", 12, controls=("shuffled",))
    store.close()
    return tmp_path / "run"


def wait_for(server: BatchServer, event: str) -> None:
    end = time.monotonic() + 60
    while server.counts()[event] == 0:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hold", "event"),
    [
        ({"uploaded": 30.0}, "uploaded"),
        ({"making": 30.0}, "POST /v1/batches"),
        ({"made": 30.0}, "made"),
        ({}, "GET /v1/batches/ID"),
        ({}, "GET /v1/files/ID/content"),
    ],
)
def test_kill_9_loses_nothing_and_repeats_nothing(hold: dict[str, float], event: str, folder: Path) -> None:
    with BatchServer(hold=hold, work_s=1.0) as server:
        first = command(folder, server)
        wait_for(server, event)
        first.kill()
        server.hold = {}
        last = command(folder, server)
        assert last.finish() == 0, last.said
        assert len(server.answered) == 12 == len(set(server.answered)) and len(server.batches) == 1
    assert len(rows(folder)) == 12
    with RunStore.open(folder) as store:
        assert store.frames().explanations["text"].notna().sum() == 12


@pytest.mark.slow
def test_ctrl_c_leaves_the_batches_and_says_so(folder: Path) -> None:
    with BatchServer(work_s=4.0) as server:
        process = command(folder, server)
        wait_for(server, "GET /v1/batches/ID")
        process.process.send_signal(signal.SIGINT)
        stopped = time.monotonic()
        assert process.finish(10) == 130 and time.monotonic() - stopped < 3
        said = " ".join(process.said.split())
        assert "keeps working on 11 requests in batches (1); the same command fetches their answers" in said
        assert "run the same command to resume" in said and "Traceback" not in said
        assert "waiting for" not in said
        other = command(folder, server, "openai")
        assert other.finish() == 0, other.said
        warned = " ".join(other.said.split())
        assert "11 requests of stand-in are in batches; --client openai-batch fetches them" in warned


@pytest.mark.slow
def test_a_key_is_in_no_file_of_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-" + "0123456789abcdef" * 2
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with BatchServer(require_key=key, echo_key=True, broken=0.3, work_s=0.1) as server:
        process = command(folder, server)
        process.finish()
        assert server.answered
    files = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file()).decode("latin-1")
    for place in (files, process.said):
        assert not [piece for piece in (key[:16], key[8:24], key[-16:]) if piece in place]
    assert (folder / BATCHES).is_file()


@pytest.mark.slow
def test_a_mistake_shows_in_a_second_and_not_in_a_day(folder: Path) -> None:
    with BatchServer(require_key="sk-another") as server:
        process = command(folder, server)
        assert process.finish() == 2
        assert process.said.count("error:") == 1 and "missing or wrong" in process.said
        assert not server.names
