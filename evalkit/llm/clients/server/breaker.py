"""The circuit breaker of one server: when to stop sending to a server that fails, for how long, and when to probe it.

The breaker opens (no requests) as soon as a request gets no reply at all, or when half of the requests in the last minute
failed. After a rest, which doubles every time, a single request probes the server; the others wait for its result. Sends
nothing itself; the caller provides the clock.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Breaker"]

_LOG = logging.getLogger(__name__)
_REST_S, _LONGEST_REST_S = 5.0, 60.0
_DOUBLINGS = 8  # limit of the exponent, to avoid overflow
_WINDOW_S, _WINDOW = 60.0, 40  # outcomes that count: those of the last minute, and at most this many
_LEAST_FAILURES, _SHARE = 5, 0.5  # the breaker opens at this number of failures if they are this share of the outcomes
_TELL_EVERY_S = 60.0


class Breaker:
    """The breaker of one server: closed (requests go there as usual) or open (no requests, except a single probe).

    ``trips``: how often in a row it was opened; 0 for a healthy server.
    ``reason``: of the last failure.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.url, self.reason = url, ""
        self.trips = 0
        self.resting_until = self.failed_at = -math.inf
        self._clock = clock
        self._open = self._probing = self._telling = False
        self._tripped_at = self._closed_at = self._told_at = -math.inf
        self._outcomes: deque[tuple[float, bool]] = deque(maxlen=_WINDOW)

    @property
    def is_open(self) -> bool:
        return self._open

    def admits(self) -> bool:
        """Whether a request may be sent to the server now."""
        return not self._open or (self._clock() >= self.resting_until and not self._probing)

    def begin(self) -> bool:
        """Register a request that is being sent; returns whether it is the probe. A probe must be followed by ``end``."""
        if self._open and self.admits():
            self._probing = True
            return True
        return False

    def end(self) -> None:
        """The probe has ended, with any result."""
        self._probing = False

    def answered(self, began: float) -> None:
        """A request sent at ``began`` was answered. Ignored if it was sent before the server failed."""
        if self._open and began < self._tripped_at:
            return
        now = self._clock()
        if self._open:
            self._open, self._closed_at = False, now
            self._outcomes.clear()
            if self._telling:
                _LOG.warning("%s answers again", self.url)
                self._telling = False
        elif self.trips and now - self._closed_at > _WINDOW_S:
            self.trips = 0
        self._outcomes.append((now, True))

    def failed(self, began: float, reason: str, *, silent: bool = False, wait_s: float | None = None) -> None:
        """A request sent at ``began`` failed.

        ``silent``: there was no reply at all.
        ``wait_s``: the pause that the server asks for, in seconds.
        """
        now = self._clock()
        self.reason, self.failed_at = reason, now
        if self._open:
            if began >= self._tripped_at and now >= self.resting_until:  # a request sent earlier tells nothing new
                self._trip(now, wait_s)
            return
        self._outcomes.append((now, False))
        if silent or self._fails_too_often(now):
            self._trip(now, wait_s)

    def _fails_too_often(self, now: float) -> bool:
        recent = [well for time_, well in self._outcomes if now - time_ <= _WINDOW_S]
        failures = recent.count(False)
        return failures >= _LEAST_FAILURES and failures >= _SHARE * len(recent)

    def _trip(self, now: float, wait_s: float | None) -> None:
        if not self._open and now - self._closed_at > _WINDOW_S:
            self.trips = 0  # it was healthy for long enough
        rest_s = max(
            min(_REST_S * 2 ** min(self.trips, _DOUBLINGS), _LONGEST_REST_S), min(wait_s or 0.0, _LONGEST_REST_S)
        )
        self.resting_until, self._tripped_at = now + rest_s, now
        self.trips += 1
        self._open = True
        if not self._telling and now - self._told_at > _TELL_EVERY_S:
            _LOG.warning("%s: %s; retrying", self.url, self.reason)
            self._told_at, self._telling = now, True
