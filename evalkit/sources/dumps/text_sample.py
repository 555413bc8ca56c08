"""Keeps a uniform sample of texts from a stream of any length, within a limit on their number and their size.

The texts with the smallest hashes are kept, so the sample does not depend on the order of the stream. Reads and writes no
files.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evalkit.records import FeatureId

__all__ = ["HeldText", "SampledTexts"]

_TOKEN_BYTES = 64  # estimated memory of a token beyond its characters: the string object and a reference to it


@dataclass(slots=True, eq=False)
class HeldText:
    """A text and its recorded activations so far, by feature. ``valid``: False for BOS, EOS and padding tokens."""

    tokens: tuple[str, ...]
    valid: tuple[bool, ...]
    activations: dict[FeatureId, NDArray[np.float32]] = field(default_factory=dict)


class SampledTexts:
    """At most ``most`` texts that take about ``room`` bytes or less in total. ``held``: the texts by their hash."""

    def __init__(self, most: int, room: int) -> None:
        self.held: dict[int, HeldText] = {}
        self._most, self._room = most, room
        self._heap: list[tuple[int, int, int]] = []  # (-priority, text, bytes)
        self._bar: tuple[int, int] | None = None  # the smallest (priority, text) dropped so far

    def offer(
        self,
        text: int,
        priority: int,
        tokens: tuple[str, ...],
        valid: tuple[bool, ...],
        recorded: tuple[FeatureId, NDArray[np.float32]] | None,
    ) -> None:
        """Add one record of a text. Of two records of one feature and text, the one with the larger maximum is kept."""
        if self._bar is not None and (priority, text) >= self._bar:
            return
        if text not in self.held:
            self.held[text] = HeldText(tokens, valid)
            size = sum(map(len, tokens)) + _TOKEN_BYTES * len(tokens)
            heapq.heappush(self._heap, (-priority, -text, size))
            self._room -= size
            while len(self.held) > self._most or self._room < 0:
                self._drop()
        if recorded is not None and text in self.held:
            feature, values = recorded
            known = self.held[text].activations
            if feature not in known or _order(values) > _order(known[feature]):
                known[feature] = values

    def _drop(self) -> None:
        priority, text, size = heapq.heappop(self._heap)
        self._bar = (-priority, -text)
        del self.held[-text]
        self._room += size


def _order(values: NDArray[np.float32]) -> tuple[float, tuple[float, ...]]:
    return float(values.max()), tuple(values.tolist())
