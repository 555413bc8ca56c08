"""Decides how large the next batch may be and when to submit it, from batches that the server accepted or rejected.

Knows counts and times only.
"""

from __future__ import annotations

__all__ = ["Room"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 60.0, 600.0  # before submitting to a server that was full
_DOUBLINGS = 10  # limit of the exponent, to avoid overflow; the pause reaches its maximum earlier
# A server that rejects even a small batch is probably full of other users' batches, so smaller batches would not help.
_LEAST_REQUESTS = 100  # smallest size that a batch is cut to because the server is full …
_LEAST_REFUSALS = 3  # … until this many batches of that size were rejected
_TAKEN = 3  # accepted batches in a row after which several may be open at a time again


class Room:
    """The room for batches at one server, at most ``most`` requests each.

    ``size``: largest number of requests in the next batch.
    ``alone``: whether the next batch waits until no other is open.
    ``pause_s``: seconds to wait before submitting it.
    """

    def __init__(self, most: int) -> None:
        self.size = self._fitting = most
        self.alone, self.pause_s = False, 0.0
        self._refusals = self._small_refusals = self._taken = 0

    def too_large(self, count: int) -> None:
        """The server rejected a file of ``count`` requests as too large; such a size is never tried again."""
        self.size = self._fitting = max(1, count // 2)

    def full(self, count: int) -> None:
        """The server had no room for a batch of ``count`` requests: submit smaller ones, one at a time, after a pause."""
        half = max(1, count // 2)
        if half < _LEAST_REQUESTS and self._small_refusals < _LEAST_REFUSALS:  # probably full of other users' batches
            self.size = min(count, _LEAST_REQUESTS)
            self._small_refusals += 1
        else:
            self.size = half
        self.alone, self._taken = True, 0
        self._refusals += 1
        self.pause_s = min(_FIRST_PAUSE_S * 2 ** min(self._refusals - 1, _DOUBLINGS), _LONGEST_PAUSE_S)

    def took(self) -> None:
        """A batch was accepted: the next ones grow back to their former size, and later need not be alone."""
        self._refusals, self._small_refusals, self.pause_s = 0, 0, 0.0
        self._taken += 1
        self.size = min(2 * self.size, self._fitting)
        self.alone = self.alone and self._taken < _TAKEN
