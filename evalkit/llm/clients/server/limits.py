"""How fast requests may be sent: so many a minute, so many tokens a minute, and what a server says is left of either.

Who asks first is served first, so that a large request is not passed by small ones for ever. Tokens are estimated before
a request is sent and corrected by what its reply took. Knows no server and sends nothing; the clock is the caller's, and
has to be the one that the event loop goes by.
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
_LONGEST_TOLD_S = 300.0  # what a server says is believed for so long
_PRIOR_CHARACTERS = 4000.0  # of prompts that weigh as much as the ratio we begin with
_MOST_PER_CHARACTER = 16  # tokens of a prompt: four for each byte of a letter …
_MOST_BESIDES = 1000  # … and what servers add to it
_MOST_OVER = 8  # times a reply may be as long as was asked for: some models think first
_LONGEST_DEBT_MIN = 5.0  # of what replies took beyond what was reckoned
_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}


class Bucket:
    """``per_minute`` units a minute, evenly. It holds a second's worth, and one unit at least.

    What is more than it holds may be taken from a full one, and is owed then: within any time of t seconds no more is
    taken than ``per_minute`` · t / 60, a bucket's content and the largest single amount together.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self.rate = per_minute / 60
        self.capacity = max(self.rate, 1.0)
        self._level, self._at = self.capacity, now

    def _fill(self, now: float) -> None:
        self._level = min(self._level + self.rate * (now - self._at), self.capacity)
        self._at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until so much may be taken."""
        self._fill(now)
        return (min(amount, self.capacity) - self._level) / self.rate

    def take(self, amount: float, now: float) -> None:
        """Take it, however much is there; a negative amount is given back."""
        self._fill(now)
        self._level = min(self._level - amount, self.capacity)

    def correct(self, amount: float, now: float) -> None:
        """Take what was found out later, or give it back; no more is owed for it than a few minutes make good."""
        self._fill(now)
        owed = min(self._level, -_LONGEST_DEBT_MIN * 60 * self.rate)
        self._level = min(max(self._level - amount, owed), self.capacity)


@dataclass(slots=True)
class _Told:
    """What a server says is left. It fills evenly until ``until``, when all is as before; not at all with a rate of 0."""

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
    """Tokens per character of prompts, learned from replies."""

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
    """Leave to send one request, with the tokens that it is reckoned with."""

    characters: int
    tokens: float
    max_tokens: int = 0  # of these, those of the reply


class Limits:
    """Keeps ``requests_per_minute`` and ``tokens_per_minute`` where they are given, and what ``told`` hears in any case.

    To be made and used in one event loop.
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
        self._out: dict[str, float] = {"requests": 0, "tokens": 0.0}  # permits whose requests are under way
        self._turn, self._news = asyncio.Lock(), asyncio.Event()
        self._dismissed = 0

    async def admit(self, characters: int, max_tokens: int) -> Permit | None:
        """Wait for leave to send a prompt of so many characters and get a reply of so many tokens at most.

        None to those who waited when ``dismiss`` was called. Whoever has a permit gives it back with ``leave``.
        """
        permit = Permit(characters, characters * self.ratio.value + max_tokens, max_tokens)
        dismissed = self._dismissed
        async with self._turn:  # hands itself on in the order of arrival
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
        """The request is done with. ``unsent``: it never was sent, and what it took is there for others."""
        self._out["requests"] -= 1
        self._out["tokens"] -= permit.tokens
        if unsent:
            now = self._clock()
            for bucket, amount in ((self._requests, 1.0), (self._tokens, permit.tokens)):
                if bucket is not None:
                    bucket.take(-amount, now)
            self._news.set()

    def correct(self, permit: Permit, prompt_tokens: int, completion_tokens: int) -> None:
        """What a request really took, by its reply; nothing where the reply does not say, or says what cannot be."""
        if not 0 < prompt_tokens <= _MOST_PER_CHARACTER * permit.characters + _MOST_BESIDES:
            return
        completion_tokens = min(completion_tokens, _MOST_OVER * permit.max_tokens + _MOST_BESIDES)
        self.ratio.learn(permit.characters, prompt_tokens)
        if self._tokens is not None:
            self._tokens.correct(prompt_tokens + completion_tokens - permit.tokens, self._clock())
            self._news.set()

    def told(self, headers: Mapping[str, str]) -> None:
        """What ``x-ratelimit-remaining-…`` and ``x-ratelimit-reset-…`` of a reply say; nothing where they say nothing.

        Where the limit itself is told, what is left grows evenly until the reset, else not before it. Requests under
        way count as not yet taken off.
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
        """Send all away who wait now."""
        self._dismissed += 1
        self._news.set()


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


def duration_s(text: str | None) -> float | None:
    """Seconds of a duration such as ``6m0s``, ``1.5s``, ``20ms`` or a bare number of seconds; None for anything else."""
    found = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", (text or "").strip())
    if not found or "".join(number + unit for number, unit in found) != (text or "").strip():
        return None
    return sum(float(number) * _UNITS_S[unit] for number, unit in found)
