"""Assigns the dictionaries to the panels of the score figure, by L0 and width. Pure functions; draws nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evalkit.report.rows import Source

__all__ = ["Panels", "arrange"]

_SAME_L0 = 1.5  # the L0s of two dictionaries count as equal if they differ by less than this factor


@dataclass(frozen=True, slots=True)
class Panels:
    """The dictionaries of each panel.

    ``width``, ``by_l0``: the dictionaries with this width, to be drawn against L0.
    ``l0``, ``by_width``: the dictionaries with about this L0, to be drawn against width.
    ``others``: the dictionaries without an L0 or a width.
    ``left_out``: the dictionaries that fit no panel.
    """

    width: int | None
    l0: float | None
    by_l0: tuple[Source, ...]
    by_width: tuple[Source, ...]
    rqae: tuple[Source, ...]
    controls: tuple[Source, ...]
    others: tuple[Source, ...]
    left_out: tuple[Source, ...]


def arrange(sources: Sequence[Source]) -> Panels:
    """The panels of a run's dictionaries.

    The width is the one with the most different L0s; among equals, the largest. The L0 is the one that dictionaries of the
    most widths come near; among equals, the one with the smallest distances.
    """
    controls = tuple(source for source in sources if source.is_null)
    rqae = tuple(source for source in sources if source.is_rqae)
    sized = [s for s in sources if not s.is_null and not s.is_rqae and s.width and s.l0]
    width = _best_width(sized)
    l0, by_width = _best_l0(sized)
    by_l0 = tuple(sorted((s for s in sized if s.width == width), key=lambda s: (s.l0 or 0, s.name)))
    others = tuple(s for s in sources if not s.is_null and not s.is_rqae and not (s.width and s.l0))
    shown = {source.name for source in (*by_l0, *by_width, *rqae, *controls, *others)}
    left_out = tuple(source for source in sources if source.name not in shown)
    return Panels(width, l0, by_l0, by_width, rqae, controls, others, left_out)


def _best_width(sized: Sequence[Source]) -> int | None:
    l0s: dict[int, set[float]] = {}
    for source in sized:
        l0s.setdefault(source.width or 0, set()).add(source.l0 or 0)
    return max(l0s, key=lambda width: (len(l0s[width]), width), default=None)


def _best_l0(sized: Sequence[Source]) -> tuple[float | None, tuple[Source, ...]]:
    """The chosen L0, and for each series (kind and site) and width the dictionary whose L0 is nearest to it."""
    best: tuple[tuple[int, float], float | None, tuple[Source, ...]] = ((0, 0.0), None, ())
    for target in sorted({source.l0 or 0 for source in sized}):
        nearest: dict[tuple[str, str, int], tuple[float, str, Source]] = {}
        for source in sized:
            distance = abs(math.log((source.l0 or 0) / target))
            key = (source.kind, source.site, source.width or 0)
            if distance < math.log(_SAME_L0) and (key not in nearest or (distance, source.name) < nearest[key][:2]):
                nearest[key] = (distance, source.name, source)
        rank = (len(nearest), -sum(entry[0] for entry in nearest.values()))
        if best[1] is None or rank > best[0]:
            chosen = tuple(nearest[key][2] for key in sorted(nearest))
            best = (rank, target, chosen)
    return best[1], best[2]
