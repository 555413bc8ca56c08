"""Rate limits: requests per minute, tokens per minute, and the quota of either that a server reports as remaining.

Requests are admitted in order of arrival, so that small ones cannot overtake a large one for ever. Tokens are estimated
before a request is sent and corrected once its reply reports the usage. Knows no server and sends nothing. The caller
provides the clock, which must be the event loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from evalkit.llm.accounting.budget import TOKENS_PER_CHARACTER

__all__ = ["Bucket", "Limits", "Permit", "TokenRatio", "duration_s"]

_SOON_S = 1e-6  # shorter waits are rounding errors
_LONGEST_TOLD_S = 300.0  # how long a limit that a server reports is respected
_PRIOR_CHARACTERS = 4000.0  # weight of the initial tokens-per-character ratio, in characters of prompts
# A reply that reports more tokens than these is not believed, so that a faulty server cannot block all requests.
_MOST_PER_CHARACTER = 16  # prompt tokens per character: four per byte, at four bytes per character
_MOST_BESIDES = 1000  # tokens that a server may add to a prompt or a reply
_MOST_OVER = 8  # length of a reply as a multiple of max_tokens: some models think first
_LONGEST_DEBT_MIN = 5.0  # limit of the debt from replies that used more tokens than estimated, in minutes of refilling
_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}


class Bucket:
    """A token bucket that refills evenly at ``per_minute`` units per minute.

    Its capacity is one second's refill, but at least one unit. An amount above the capacity can be taken from a full
    bucket, whose level then becomes negative. So in any t seconds at most ``per_minute`` · t / 60 units are taken, plus
    the capacity and the largest single amount.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self.rate = per_minute / 60
        self.capacity = max(self.rate, 1.0)
        self._level, self._at = self.capacity, now

    def _fill(self, now: float) -> None:
        self._level = min(self._level + self.rate * (now - self._at), self.capacity)
        self._at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` may be taken; not above 0 if it may be taken now."""
        self._fill(now)
        return (min(amount, self.capacity) - self._level) / self.rate

    def take(self, amount: float, now: float) -> None:
        """Take an amount, whatever the level; a negative amount is a refund."""
        self._fill(now)
        self._level = min(self._level - amount, self.capacity)

    def correct(self, amount: float, now: float) -> None:
        """Take or refund the difference to an earlier estimate; this causes at most a few minutes of debt."""
        self._fill(now)
        owed = min(self._level, -_LONGEST_DEBT_MIN * 60 * self.rate)
        self._level = min(max(self._level - amount, owed), self.capacity)


@dataclass(slots=True)
class _Told:
    """The remaining quota that a server reported.

    ``level``: what remained at the time ``at``.
    ``rate``: refill per second; 0 if unknown.
    ``limit``: the full quota.
    ``until``: when this stops to apply.
    """

    level: float
    rate: float
    limit: float
    at: float
    until: float

    def wait_s(self, amount: float, now: float) -> float:
        if now >= self.until:
            return 0.0
        missing = min(amount, self.limit) - self.level - self.rate * (now - self.at)
        if missing <= 0:
            return 0.0
        return min(self.until - now, missing / self.rate if self.rate > 0 else math.inf)

    def take(self, amount: float) -> None:
        self.level -= amount


class TokenRatio:
    """Tokens per character of prompts, estimated from the usage that replies report."""

    def __init__(self) -> None:
        self._characters, self._tokens = _PRIOR_CHARACTERS, _PRIOR_CHARACTERS * TOKENS_PER_CHARACTER

    def learn(self, characters: int, tokens: int) -> None:
        if characters > 0 and tokens > 0:
            self._characters += characters
            self._tokens += tokens

    @property
    def value(self) -> float:
        return self._tokens / self._characters


@dataclass(frozen=True, slots=True)
class Permit:
    """Permission to send one request.

    ``characters``: length of the prompt.
    ``tokens``: estimate for prompt and reply.
    ``max_tokens``: the part of ``tokens`` that is for the reply.
    """

    characters: int
    tokens: float
    max_tokens: int = 0


class Limits:
    """Keeps requests within rate limits. Create and use it in one event loop.

    ``requests_per_minute``, ``tokens_per_minute``: the account's limits; None for no limit.

    Limits that a server reports (``told``) apply in addition.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        now = clock()
        self._requests = None if requests_per_minute is None else Bucket(requests_per_minute, now)
        self._tokens = None if tokens_per_minute is None else Bucket(tokens_per_minute, now)
        self._told: dict[str, _Told] = {}
        self.ratio = TokenRatio()
        self._out: dict[str, float] = {"requests": 0, "tokens": 0.0}  # quota of requests in flight
        self._turn, self._news = asyncio.Lock(), asyncio.Event()
        self._dismissed = 0

    async def admit(self, characters: int, max_tokens: int) -> Permit | None:
        """Wait until a prompt of ``characters`` with a reply of at most ``max_tokens`` may be sent; the permit for it.

        Returns None if ``dismiss`` is called meanwhile. Every permit must be given back with ``leave``.
        """
        permit = Permit(characters, characters * self.ratio.value + max_tokens, max_tokens)
        dismissed = self._dismissed
        async with self._turn:  # asyncio's lock is granted in order of arrival
            while dismissed == self._dismissed:
                now = self._clock()
                wait_s = self._wait_s(permit, now)
                if wait_s <= _SOON_S:
                    self._take(permit, now)
                    return permit
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._news.wait()
        return None

    def _wait_s(self, permit: Permit, now: float) -> float:
        waits = [
            limit.wait_s(amount, now)
            for limit, amount in (
                (self._requests, 1.0),
                (self._tokens, permit.tokens),
                (self._told.get("requests"), 1.0),
                (self._told.get("tokens"), permit.tokens),
            )
            if limit is not None
        ]
        return max(waits, default=0.0)

    def _take(self, permit: Permit, now: float) -> None:
        for kind, bucket, amount in (("requests", self._requests, 1.0), ("tokens", self._tokens, permit.tokens)):
            self._out[kind] += amount
            if bucket is not None:
                bucket.take(amount, now)
            if kind in self._told:
                self._told[kind].take(amount)

    def leave(self, permit: Permit, *, unsent: bool = False) -> None:
        """Give a permit back. ``unsent``: the request was never sent, so refund its reserved quota."""
        self._out["requests"] -= 1
        self._out["tokens"] -= permit.tokens
        if unsent:
            now = self._clock()
            for bucket, amount in ((self._requests, 1.0), (self._tokens, permit.tokens)):
                if bucket is not None:
                    bucket.take(-amount, now)
            self._news.set()

    def correct(self, permit: Permit, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace a request's estimate by the usage that its reply reports; ignored if the reply reports none.

        An implausible number of prompt tokens is ignored, an implausible number of reply tokens is capped.
        """
        if not 0 < prompt_tokens <= _MOST_PER_CHARACTER * permit.characters + _MOST_BESIDES:
            return
        completion_tokens = min(completion_tokens, _MOST_OVER * permit.max_tokens + _MOST_BESIDES)
        self.ratio.learn(permit.characters, prompt_tokens)
        if self._tokens is not None:
            self._tokens.correct(prompt_tokens + completion_tokens - permit.tokens, self._clock())
            self._news.set()

    def told(self, headers: Mapping[str, str]) -> None:
        """Use the remaining quota in a reply's ``x-ratelimit-…`` headers, which are ignored if missing or malformed.

        If a header gives the limit too, the quota refills evenly until the reset; otherwise it stays until the reset.
        Requests in flight are deducted, as the server has not counted them yet.
        """
        now = self._clock()
        for kind in self._out:
            left = _number(headers.get(f"x-ratelimit-remaining-{kind}"))
            reset_s = duration_s(headers.get(f"x-ratelimit-reset-{kind}"))
            if left is None or reset_s is None:
                continue
            limit = _number(headers.get(f"x-ratelimit-limit-{kind}"))
            rate = 0.0 if limit is None or reset_s == 0 else max(limit - left, 0.0) / reset_s
            until = now + min(reset_s, _LONGEST_TOLD_S)
            largest = limit if limit is not None and limit > 0 else math.inf
            self._told[kind] = _Told(left - self._out[kind], rate, largest, now, until)
        self._news.set()

    def dismiss(self) -> None:
        """Make ``admit`` return None to all callers that wait now."""
        self._dismissed += 1
        self._news.set()


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


def duration_s(text: str | None) -> float | None:
    """The seconds of a duration: ``6m0s``, ``1.5s``, ``20ms`` or a number of seconds; None for anything else."""
    found = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", (text or "").strip())
    if not found or "".join(number + unit for number, unit in found) != (text or "").strip():
        return None
    return sum(float(number) * _UNITS_S[unit] for number, unit in found)
