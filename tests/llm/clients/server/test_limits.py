"""Limits on requests and tokens, in virtual time: never passed, never wasted, and nobody is passed over."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalkit.llm.clients.server.limits import Limits, Permit, duration_s
from tests.support.virtual_time import run

FEW = 10**9  # a limit that is none


def limits_of(requests: float | None = None, tokens: float | None = None) -> Limits:
    return Limits(requests, tokens, asyncio.get_running_loop().time)


def now() -> float:
    return asyncio.get_running_loop().time()


async def all_admitted(limits: Limits, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, float, float]]:
    """Number, time and tokens of every request (characters, tokens of its reply), in the order of their admission."""
    begun, seen = now(), []

    async def one(number: int, size: tuple[int, int]) -> None:
        permit = await limits.admit(*size)
        assert permit is not None
        seen.append((number, now() - begun, permit.tokens))
        limits.leave(permit)

    await asyncio.gather(*(one(number, size) for number, size in enumerate(sizes)))
    return seen


def most_within(times: Sequence[float], amounts: Sequence[float], rate: float) -> float:
    """By how much the largest window of any length goes over ``rate`` times its length."""
    sums = [0.0, *itertools.accumulate(amounts)]
    pairs = itertools.combinations_with_replacement(range(len(times)), 2)
    return max(sums[last + 1] - sums[first] - rate * (times[last] - times[first]) for first, last in pairs)


@given(st.floats(1, 5000), st.integers(1, 60))
@settings(deadline=None, max_examples=40)
def test_requests_per_minute_hold_in_every_window_and_are_used_up(rate: float, count: int) -> None:
    seen = run(with_limits(rate, None, [(4, 1)] * count))
    times, per_s = [time for _, time, _ in seen], rate / 60
    held = max(per_s, 1.0)
    assert most_within(times, [1.0] * count, per_s) <= held + 1 + 1e-6
    assert times[-1] == pytest.approx(max(0.0, (count - held) / per_s), abs=1 / per_s + 1e-6)  # no slower than it must


async def with_limits(
    requests: float | None, tokens: float | None, sizes: Sequence[tuple[int, int]]
) -> list[tuple[int, float, float]]:
    return await all_admitted(limits_of(requests, tokens), sizes)


@given(st.floats(60, 1e6), st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 2000)), min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_tokens_per_minute_hold_in_every_window_and_are_used_up(rate: float, sizes: list[tuple[int, int]]) -> None:
    seen = run(with_limits(None, rate, sizes))
    assert [number for number, _, _ in seen] == list(range(len(sizes)))  # in the order of asking
    tokens = [reckoned for _, _, reckoned in seen]
    assert tokens == [pytest.approx(characters * 0.25 + most) for characters, most in sizes]
    times, per_s = [time for _, time, _ in seen], rate / 60
    held = max(per_s, 1.0)
    assert most_within(times, tokens, per_s) <= held + max(tokens) + 1e-6
    assert times[-1] <= max(0.0, sum(tokens) / per_s) + 1e-6


@pytest.mark.parametrize("numbers", [200, 3])
def test_a_large_request_is_not_passed_over(numbers: int) -> None:
    async def go() -> list[int]:
        sizes = [(0, 1)] * numbers
        sizes[1] = (0, 5000)  # as much as ten seconds give
        return [number for number, _, _ in await all_admitted(limits_of(None, 30_000), sizes)]

    assert run(go()) == list(range(numbers))


def test_both_limits_hold_together() -> None:
    sizes = [(0, 10)] * 20 + [(0, 1000)] * 5
    by_requests, by_tokens, by_both = (
        run(with_limits(*rates, sizes)) for rates in ((60, FEW), (FEW, 6000), (60, 6000))
    )
    for one in (by_requests, by_tokens):
        assert all(both[1] >= alone[1] - 1e-9 for both, alone in zip(by_both, one, strict=True))
    assert by_both[19][1] == pytest.approx(19)  # one a second
    assert by_both[24][1] == pytest.approx(by_both[20][1] + 40)  # a hundred tokens a second


def test_without_limits_nobody_waits() -> None:
    assert {time for _, time, _ in run(with_limits(None, None, [(10**6, 10**6)] * 1000))} == {0.0}


# what replies say


def test_tokens_are_corrected_by_the_reply() -> None:
    """Replies that take a tenth of what they may: ten times as many requests, once that is known."""

    async def go(corrects: bool) -> float:
        limits, begun = limits_of(None, 6000), now()
        for _ in range(60):
            permit = await limits.admit(0, 1000)
            assert permit is not None
            limits.leave(permit)
            if corrects:
                limits.correct(permit, 60, 40)
        return now() - begun

    assert run(go(False)) == pytest.approx(590, rel=0.01)
    assert run(go(True)) == pytest.approx(59, rel=0.02)


def test_a_reply_that_took_more_is_paid_back() -> None:
    async def go() -> float:
        limits, begun = limits_of(None, 6000), now()
        permit = await limits.admit(0, 100)
        assert permit is not None
        limits.correct(permit, 1000, 200)  # 1100 more than reckoned: eleven seconds
        await limits.admit(0, 100)
        return now() - begun

    assert run(go()) == pytest.approx(12)


def test_a_reply_without_usage_changes_nothing() -> None:
    async def go() -> tuple[float, float]:
        limits = limits_of(None, 6000)
        permit = await limits.admit(400, 0)
        assert permit is not None
        before = limits.ratio.value
        limits.correct(permit, 0, 0)
        return before, limits.ratio.value

    assert run(go()) == (0.25, 0.25)


def test_the_ratio_of_tokens_to_characters_is_learned() -> None:
    async def go() -> float:
        limits = limits_of()
        for _ in range(200):
            permit = await limits.admit(2000, 10)
            assert permit is not None
            limits.correct(permit, 1200, 5)
        permit = await limits.admit(1000, 10)
        assert permit is not None
        return permit.tokens

    assert run(go()) == pytest.approx(0.6 * 1000 + 10, rel=0.01)  # a language that takes more than it looks


# going away


def test_a_cancelled_request_takes_nothing_and_holds_nobody_up() -> None:
    async def go() -> list[float]:
        limits, begun = limits_of(60), now()
        await limits.admit(0, 1)
        waiting = [asyncio.create_task(limits.admit(0, 1)) for _ in range(10)]
        await asyncio.sleep(0.5)
        for task in waiting[:9]:  # the first of them, too, which waits for its time
            task.cancel()
        await waiting[9]
        first = now() - begun
        await limits.admit(0, 1)
        return [first, now() - begun]

    assert run(go()) == [pytest.approx(1), pytest.approx(2)]


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_whoever_stays_is_admitted_whoever_leaves(seed: int) -> None:
    async def go() -> tuple[int, int, list[float]]:
        chance, limits, times = random.Random(seed), limits_of(600), []

        async def one() -> None:
            permit = await limits.admit(0, 1)
            assert permit is not None
            times.append(now())

        tasks = []
        for _ in range(30):
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(chance.choice((0, 0.03, 0.2)))
            if chance.random() < 0.5:
                chance.choice(tasks).cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        return len(times), sum(result is None for result in done), times

    admitted, stayed, times = run(go())
    assert admitted == stayed > 0
    assert most_within(times, [1.0] * admitted, 10) <= 11 + 1e-6


def test_all_who_wait_can_be_sent_away_and_the_next_are_served() -> None:
    async def go() -> tuple[list[Permit | None], float]:
        limits, begun = limits_of(1), now()
        await limits.admit(0, 1)
        waiting = [asyncio.create_task(limits.admit(0, 1)) for _ in range(50)]
        await asyncio.sleep(1)
        limits.dismiss()
        answers = await asyncio.gather(*waiting)
        left = now() - begun
        assert await limits.admit(0, 1) is not None
        assert now() - begun == pytest.approx(60)
        return answers, left

    answers, left = run(go())
    assert answers == [None] * 50 and left == 1


def test_what_was_not_sent_is_given_back() -> None:
    async def go() -> float:
        limits, begun = limits_of(6, 600), now()
        for _ in range(20):
            permit = await limits.admit(0, 10)
            assert permit is not None
            limits.leave(permit, unsent=True)
        return now() - begun

    assert run(go()) == 0


# what servers say


def told(kind: str, left: float, reset: str, limit: float | None = None) -> dict[str, str]:
    headers = {f"x-ratelimit-remaining-{kind}": str(left), f"x-ratelimit-reset-{kind}": reset}
    return headers | ({} if limit is None else {f"x-ratelimit-limit-{kind}": str(limit)})


def first_after(headers: dict[str, str], size: tuple[int, int] = (0, 100), count: int = 1) -> list[float]:
    async def go() -> list[float]:
        limits = limits_of()
        limits.told(headers)
        return [time for _, time, _ in await all_admitted(limits, [size] * count)]

    return run(go())


def test_what_a_server_says_is_left_is_kept_to() -> None:
    assert first_after(told("requests", 2, "30s"), count=4) == pytest.approx([0, 0, 30, 30])
    # sixty a minute of which two are left: one more every second until all sixty are there again
    assert first_after(told("requests", 2, "58s", 60), count=5) == pytest.approx([0, 0, 1, 2, 3])
    assert first_after(told("tokens", 250, "10s"), count=4) == pytest.approx([0, 0, 10, 10])
    assert first_after(told("tokens", 0, "60s", 6000), count=3) == pytest.approx([1, 2, 3])


def test_a_request_larger_than_a_server_s_limit_is_sent_when_all_is_there() -> None:
    assert first_after(told("tokens", 40, "0.6s", 50)) == pytest.approx([0.6])


def test_requests_under_way_count_as_not_yet_taken_off() -> None:
    async def go() -> float:
        limits = limits_of()
        for _ in range(5):
            await limits.admit(0, 1)
        limits.told(told("requests", 5, "7s"))
        begun = now()
        await limits.admit(0, 1)
        return now() - begun

    assert run(go()) == pytest.approx(7)


def test_news_end_a_wait() -> None:
    async def go() -> float:
        limits, begun = limits_of(), now()
        limits.told(told("requests", 0, "200s"))
        waiting = asyncio.create_task(limits.admit(0, 1))
        await asyncio.sleep(3)
        limits.told(told("requests", 9, "200s"))
        await waiting
        return now() - begun

    assert run(go()) == 3


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-ratelimit-remaining-requests": "0"},
        {"x-ratelimit-reset-requests": "60s"},
        told("requests", -1, "60s"),
        told("requests", float("nan"), "60s"),
        told("requests", 0, "tomorrow"),
        told("requests", 0, "0s"),
        {"x-ratelimit-remaining-requests": "none", "x-ratelimit-reset-requests": "60s"},
    ],
)
def test_what_says_nothing_changes_nothing(headers: dict[str, str]) -> None:
    assert first_after(headers, count=9) == [0.0] * 9


def test_nothing_is_believed_for_ever() -> None:
    assert first_after(told("requests", 0, "48h")) == [300.0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("20ms", 0.02),
        ("1h2m3.5s", 3723.5),
        ("1d", 86400),
        ("17", 17),
        ("0.25", 0.25),
        (" 2s ", 2),
        ("", None),
        (None, None),
        ("-1s", None),
        ("1 s", None),
        ("soon", None),
        ("2026-01-01T00:00:00Z", None),
    ],
)
def test_durations(text: str | None, seconds: float | None) -> None:
    found: Any = duration_s(text)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_the_virtual_clock_is_a_clock() -> None:
    """What the tests above stand on: waits end in their order, and only the time between them passes."""

    async def go(order: Callable[[Sequence[float]], Sequence[float]]) -> list[float]:
        seen, begun = [], now()

        async def one(seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append(round(now() - begun, 6))

        await asyncio.gather(*map(one, order([1.0, 60.0, 3600.0])))
        return seen

    assert run(go(sorted)) == run(go(lambda found: found[::-1])) == [1, 60, 3600]


def test_a_number_of_tokens_that_cannot_be_stops_nothing() -> None:
    async def go(prompt_tokens: int, completion_tokens: int) -> float:
        limits = limits_of(tokens=1000)
        permit = await limits.admit(400, 100)
        assert permit is not None
        limits.leave(permit)
        limits.correct(permit, prompt_tokens, completion_tokens)
        return (await with_limits_of(limits))[0][1]

    async def with_limits_of(limits: Limits) -> list[tuple[int, float, float]]:
        return await all_admitted(limits, [(400, 100)])

    usual = run(go(100, 100))
    assert run(go(999_999_999_999, 100)) == pytest.approx(usual, abs=60)
    assert usual < run(go(7000, 100)) <= 300 + usual
    assert usual < run(go(100, 999_999_999_999)) <= 300 + usual


def test_what_is_owed_is_a_few_minutes_worth() -> None:
    async def go() -> float:
        limits = limits_of(tokens=1000)
        for _ in range(50):
            permit = Permit(4000, 1.0, 1000)
            limits.correct(permit, 60_000, 8000)
        return (await all_admitted(limits, [(4, 1)]))[0][1]

    assert 290 < run(go()) <= 301
