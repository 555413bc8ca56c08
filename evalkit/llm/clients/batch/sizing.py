"""How large the next batch may be and when it may go: what a server that is full, or refuses large files, has room for.

Knows counts and times only.
"""

from __future__ import annotations

__all__ = ["Room"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 60.0, 600.0  # until a server that is full may have room
_DOUBLINGS = 10  # of a pause; by then it is the longest
_LEAST_REQUESTS = 100  # of a batch that is cut because the server is full …
_LEAST_REFUSALS = 3  # … until so many of that size were refused
_TAKEN = 3  # batches in a row, after which the next ones need not wait for the one before


class Room:
    """Of a server that takes batches of at most ``most`` requests.

    ``size``: of the next batch. ``alone``: it waits until no other is open. ``pause_s``: before it is handed in.
    """

    def __init__(self, most: int) -> None:
        self.size = self._fitting = most
        self.alone, self.pause_s = False, 0.0
        self._refusals = self._small_refusals = self._taken = 0

    def too_large(self, count: int) -> None:
        """A file of so many requests does not fit, and never will."""
        self.size = self._fitting = max(1, count // 2)

    def full(self, count: int) -> None:
        """A batch of so many requests was refused for now: smaller ones, one at a time, after a while."""
        half = max(1, count // 2)
        if half < _LEAST_REQUESTS and self._small_refusals < _LEAST_REFUSALS:  # it is full of others, most likely
            self.size = min(count, _LEAST_REQUESTS)
            self._small_refusals += 1
        else:
            self.size = half
        self.alone, self._taken = True, 0
        self._refusals += 1
        self.pause_s = min(_FIRST_PAUSE_S * 2 ** min(self._refusals - 1, _DOUBLINGS), _LONGEST_PAUSE_S)

    def took(self) -> None:
        """A batch was taken: after a while the next ones are as large as before, and not alone."""
        self._refusals, self._small_refusals, self.pause_s = 0, 0, 0.0
        self._taken += 1
        self.size = min(2 * self.size, self._fitting)
        self.alone = self.alone and self._taken < _TAKEN
