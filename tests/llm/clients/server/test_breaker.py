"""How well a server is held to be, by a clock of our own."""

from __future__ import annotations

import random

import pytest

from evalkit.llm.clients.server.breaker import Breaker

SERVER = "http://here/v1"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(SERVER, clock)


def probe(breaker: Breaker, clock: Clock, *, well: bool) -> None:
    """The one request after a rest."""
    clock.now = max(clock.now, breaker.resting_until)
    assert breaker.admits() and breaker.begin()
    if well:
        breaker.answered(clock.now)
    else:
        breaker.failed(clock.now, "status 500")
    breaker.end()


def test_a_silent_server_rests_longer_every_time(breaker: Breaker, clock: Clock) -> None:
    rests = []
    for _ in range(6):
        for _ in range(5):  # requests that meet the same silence
            breaker.failed(clock.now, "no connection", silent=True)
        rests.append(breaker.resting_until - clock.now)
        assert not breaker.admits()
        clock.now = breaker.resting_until + 1
    assert rests == [5, 10, 20, 40, 60, 60]


def test_one_request_is_sent_after_the_rest_to_see(breaker: Breaker, clock: Clock) -> None:
    breaker.failed(clock.now, "no connection", silent=True)
    clock.now += 4.9
    assert not breaker.admits() and not breaker.begin()
    clock.now += 0.2
    assert breaker.admits() and breaker.begin()
    assert not breaker.admits() and not breaker.begin()  # until it is known what comes of it
    breaker.end()  # cancelled, for example: nothing is known
    assert breaker.begin()
    breaker.answered(clock.now)
    breaker.end()
    assert not breaker.is_open and breaker.admits()
    assert not breaker.begin()  # an ordinary request


def test_few_failures_among_answers_are_no_reason(breaker: Breaker, clock: Clock) -> None:
    for number in range(200):
        clock.now += 0.1
        if number % 3 == 0:
            breaker.failed(clock.now, "status 500")
        else:
            breaker.answered(clock.now)
        assert breaker.admits()


@pytest.mark.parametrize("share", [0.6, 0.9, 1.0])
def test_too_large_a_share_of_failures_is_one_though_they_are_not_in_a_row(
    share: float, breaker: Breaker, clock: Clock
) -> None:
    chance, asked = random.Random(1), 0
    while breaker.admits() and asked < 1000:
        clock.now += 0.1
        asked += 1
        if chance.random() < share:
            breaker.failed(clock.now, "status 503")
        else:
            breaker.answered(clock.now)
    assert 5 <= asked <= 25 and breaker.reason == "status 503"


def test_failures_of_long_ago_do_not_count(breaker: Breaker, clock: Clock) -> None:
    for _ in range(50):
        breaker.failed(clock.now, "status 500")
        clock.now += 16  # never five within a minute
        assert breaker.admits()


def test_four_failures_are_too_few_to_know(breaker: Breaker, clock: Clock) -> None:
    for _ in range(4):
        breaker.failed(clock.now, "status 500")
    assert breaker.admits()
    breaker.failed(clock.now, "status 500")
    assert not breaker.admits()


def test_what_was_asked_before_the_failure_says_nothing(breaker: Breaker, clock: Clock) -> None:
    before = clock.now
    clock.now += 1
    breaker.failed(clock.now, "no connection", silent=True)
    until = breaker.resting_until
    clock.now += 7
    breaker.answered(before)  # a slow answer from before
    breaker.failed(before, "no reply", silent=True)  # and a slow failure
    assert breaker.is_open and breaker.resting_until == until
    breaker.answered(clock.now)  # asked although it rested, as where there is no other
    assert not breaker.is_open


def test_one_that_fails_again_soon_rests_on_where_it_was(breaker: Breaker, clock: Clock) -> None:
    breaker.failed(clock.now, "no connection", silent=True)
    rests = []
    for _ in range(4):
        probe(breaker, clock, well=True)
        clock.now += 10
        breaker.failed(clock.now, "no connection", silent=True)
        rests.append(breaker.resting_until - clock.now)
    assert rests == [10, 20, 40, 60]
    probe(breaker, clock, well=True)
    clock.now += 61  # long enough to be forgiven
    breaker.failed(clock.now, "no connection", silent=True)
    assert breaker.resting_until - clock.now == 5


def test_a_failed_probe_doubles_the_rest(breaker: Breaker, clock: Clock) -> None:
    breaker.failed(clock.now, "no connection", silent=True)
    for rest in (10, 20):
        probe(breaker, clock, well=False)
        assert breaker.resting_until - clock.now == rest and not breaker.admits()


def test_a_server_may_say_how_long_it_wants_to_rest(breaker: Breaker, clock: Clock) -> None:
    for _ in range(5):
        breaker.failed(clock.now, "status 503", wait_s=30)
    assert breaker.resting_until - clock.now == 30
    probe(breaker, clock, well=True)
    for _ in range(5):
        breaker.failed(clock.now, "status 503", wait_s=86400)
    assert breaker.resting_until - clock.now == 60


def test_the_user_hears_of_it_once_a_minute(breaker: Breaker, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        breaker.failed(clock.now, "no connection", silent=True)
    probe(breaker, clock, well=True)
    breaker.answered(clock.now)
    for _ in range(6):  # a server that comes and goes
        clock.now += 4
        breaker.failed(clock.now, "came and went", silent=True)
        probe(breaker, clock, well=True)
    told = [record.getMessage() for record in caplog.records]
    assert told[:2] == [f"{SERVER}: no connection; retrying", f"{SERVER} answers again"]
    assert set(told[2:]) == {f"{SERVER}: came and went; retrying", f"{SERVER} answers again"}
    assert len(told) <= 2 + 2 * (clock.now - 1000) / 60


def test_a_server_may_be_gone_for_days(breaker: Breaker, clock: Clock) -> None:
    for _ in range(1100):
        breaker.failed(clock.now, "no connection", silent=True)
        assert clock.now < breaker.resting_until <= clock.now + 60
        clock.now = breaker.resting_until
