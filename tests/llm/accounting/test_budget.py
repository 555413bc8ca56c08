"""Limits on calls and cost: held before they are passed, with requests in flight counted, and over several commands."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalkit.errors import BudgetSpent, NoAnswer
from evalkit.llm.accounting.answer_store import KeyedRequest
from evalkit.llm.accounting.budget import TOKENS_PER_CHARACTER, BudgetedClient
from evalkit.llm.accounting.prices import Price
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.pipeline.stages import run
from evalkit.records import Message, Response
from evalkit.store.run_store import RunStore
from tests.support.servers import ChatServer
from tests.support.word_features import collected

PRICE = Price(prompt=1.0, completion=4.0)
MOST = 1.5 * TOKENS_PER_CHARACTER  # tokens that a character of a prompt is reckoned with


class Metered:
    """A live client whose replies take so many tokens, as long as they may be; ``most`` is how many it had in flight."""

    name = "m"

    def __init__(self, prompt_tokens: int = 10, fails: Sequence[int] = ()) -> None:
        self.prompt_tokens, self.fails = prompt_tokens, fails
        self.asked = self.in_flight = self.most = 0

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        self.asked += 1
        number = self.asked
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(0.001 * (number % 3))
        self.in_flight -= 1
        if number in self.fails:
            raise NoAnswer("server", expected="an answer", seen="none", fix="wait")
        return Response("x", prompt_tokens=self.prompt_tokens, completion_tokens=options["max_tokens"])


def ask_all(client: BudgetedClient, count: int, characters: int = 40, max_tokens: int = 10) -> list[Any]:
    async def all_at_once() -> list[Any]:
        asked = [client.generate([Message("user", "x" * characters)], max_tokens=max_tokens) for _ in range(count)]
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(all_at_once())


@pytest.mark.parametrize("limit", [0, 1, 7, 30])
def test_no_call_more_than_allowed(limit: int) -> None:
    live = Metered()
    results = ask_all(BudgetedClient(live, max_calls=limit), 20)
    kinds = Counter(type(result) for result in results)
    assert live.asked == kinds[Response] == min(limit, 20) and kinds[BudgetSpent] == max(20 - limit, 0)


def test_a_server_that_tells_no_usage_spends_what_was_reckoned() -> None:
    """Else a limit on cost would never be reached."""
    live = Metered(prompt_tokens=0)
    most = PRICE.cost(MOST * 40, 10)
    results = ask_all(BudgetedClient(live, max_cost=7.5 * most, price=PRICE), 20)
    assert live.asked == Counter(type(result) for result in results)[Response] == 7


def test_what_is_under_way_in_batches_counts_once() -> None:
    """Handed in by an earlier command and not answered yet: paid all the same, and not again when it is asked for."""
    asked = [[Message("user", f"{'x' * 40}{number}")] for number in range(6)]
    handed_in = [KeyedRequest.of("m", GenerateRequest(messages, max_tokens=10)) for messages in asked]
    most = PRICE.cost(MOST * 41, 10)
    for limits in ({"max_calls": 10}, {"max_cost": 10.5 * most}):
        live = Metered(prompt_tokens=int(MOST * 41))
        client = BudgetedClient(live, price=PRICE, **limits)
        client.count_under_way(handed_in)
        assert client.spent_calls == 6 and client.spent_cost == 0
        others = ask_all(client, 20, 41)
        assert sum(isinstance(one, Response) for one in others) == 4
        again = [asyncio.run(client.generate(messages, max_tokens=10)) for messages in asked]
        assert all(isinstance(one, Response) for one in again) and live.asked == client.spent_calls == 10
        assert client.spent_cost == pytest.approx(10 * PRICE.cost(live.prompt_tokens, 10))


def test_what_earlier_commands_spent_counts() -> None:
    live = Metered()
    client = BudgetedClient(live, max_calls=10, spent_calls=8, price=PRICE, spent_cost=0.5)
    results = ask_all(client, 5)
    assert live.asked == 2 and client.spent_calls == 10
    assert client.spent_cost == pytest.approx(0.5 + 2 * (10 * 1 + 10 * 4) / 1e6)
    (first, *_) = [result for result in results if isinstance(result, BudgetSpent)]
    assert str(first) == (
        "--max-calls: expected at most 10 requests in this run; seen more requests to send; "
        "fix: raise the limit and run the same command again; it resumes, and every answer is kept"
    )


@settings(deadline=None, max_examples=50)
@given(
    limit=st.floats(0, 2e-3),
    characters=st.integers(3, 400),  # with fewer the prompt has no token, as where a server tells none
    max_tokens=st.integers(1, 50),
    count=st.integers(1, 40),
    spent=st.floats(0, 1e-3),
)
def test_the_cost_never_passes_the_limit(
    limit: float, characters: int, max_tokens: int, count: int, spent: float
) -> None:
    """However many are in flight, as long as prompts have no more tokens than the estimate allows."""
    live = Metered(prompt_tokens=int(MOST * characters))
    client = BudgetedClient(live, max_cost=limit, price=PRICE, spent_cost=spent)
    results = ask_all(client, count, characters, max_tokens)
    assert live.asked == sum(isinstance(result, Response) for result in results)
    assert client.spent_cost == pytest.approx(
        spent + live.asked * PRICE.cost(live.prompt_tokens, max_tokens), rel=1e-9, abs=1e-12
    )
    assert client.spent_cost <= max(limit, spent) + 1e-12
    one_more = PRICE.cost(MOST * characters, max_tokens)
    if live.asked < count:  # and it stops no earlier than it must
        assert client.spent_cost + one_more * (live.most + 1) > limit


def test_a_failed_request_gives_its_reservation_back() -> None:
    one = PRICE.cost(MOST * 40, 10)
    live = Metered(fails=range(1, 6))
    client = BudgetedClient(live, max_cost=5.5 * one, price=PRICE)
    assert all(isinstance(result, NoAnswer) for result in ask_all(client, 5))
    assert client.spent_cost == 0 and client.spent_calls == 5
    assert sum(isinstance(result, Response) for result in ask_all(client, 5)) == 5


def test_a_price_without_a_limit_only_counts() -> None:
    client = BudgetedClient(Metered(), price=PRICE)
    ask_all(client, 3)
    assert client.spent_cost == pytest.approx(3 * 50 / 1e6)


# whole runs


def recorded(folder: Path) -> tuple[int, int, int]:
    """Answers, prompt tokens and completion tokens in a run's file."""
    query = "SELECT count(*), total(prompt_tokens), total(completion_tokens) FROM answers"
    with closing(sqlite3.connect(folder / "calls.sqlite")) as database:
        return tuple(map(int, database.execute(query).fetchone()))  # type: ignore[return-value]


def options_of(server: ChatServer) -> dict[str, Any]:
    return {
        "explainers": ("default",),
        "judges": ("llm",),
        "controls": ("shuffled",),
        "client": f"openai:{server.model}",
        "client_options": {"base_url": [server.base_url]},
    }


def go_on(folder: Path, server: ChatServer, **limits: Any) -> None:
    store, config = collected(folder, 4, **options_of(server), **limits)
    store.close()
    run(config, folder, stages=("explain", "score"))


def stopped_by(group: pytest.ExceptionInfo[ExceptionGroup[Exception]]) -> str:
    found: Any = group.value.subgroup(BudgetSpent)
    while isinstance(found, ExceptionGroup):
        found = found.exceptions[0]
    return str(found.subject)


def test_a_run_stops_at_its_calls_and_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with ChatServer(delay_s=0.01) as server:
        for limit in (3, 9, 21):
            with pytest.raises(ExceptionGroup) as caught:
                go_on(folder, server, max_calls=limit)
            assert stopped_by(caught) == "--max-calls"
            # all that was sent was waited for and recorded
            assert server.counts()["received"] == server.counts()["finished"] == recorded(folder)[0] == limit
        go_on(folder, server, max_calls=1000)
        whole = server.counts()["received"]
        go_on(folder, server, max_calls=whole)
        events = Counter(entry["body"] for entry in server.log if entry["event"] == "received")
    assert server.counts()["received"] == whole == recorded(folder)[0] > 21
    assert set(events.values()) == {1}  # no request was sent twice
    with RunStore.open(folder) as store:
        (asked,) = store.asked()
        frames = store.frames()
    assert asked.calls == whole and asked.cost is None
    assert frames.features["status"].eq("ok").all() and frames.judgements["match"].notna().mean() > 0.9


def test_a_run_stops_before_its_cost_is_passed(tmp_path: Path) -> None:
    folder, prices = tmp_path / "run", tmp_path / "prices.toml"
    prices.write_text('["stand-in"]\nprompt = 1.0\ncompletion = 4.0\n')
    with ChatServer(delay_s=0.005) as server:
        before = 0.0
        for limit in (0.004, 0.012):
            with pytest.raises(ExceptionGroup) as caught:
                go_on(folder, server, prices=prices, max_cost=limit)
            assert stopped_by(caught) == "--max-cost"
            calls, prompt, completion = recorded(folder)
            spent = PRICE.cost(prompt, completion)
            assert before < spent <= limit and server.counts()["received"] == calls
            before = spent
        go_on(folder, server, prices=prices, max_cost=1.0)
        calls, prompt, completion = recorded(folder)
        events = Counter(entry["body"] for entry in server.log if entry["event"] == "received")
    assert max(events.values()) == 1 and len(events) == calls
    with RunStore.open(folder) as store:
        (asked,) = store.asked()
    assert asked.cost == pytest.approx(PRICE.cost(prompt, completion)) and asked.calls == calls
