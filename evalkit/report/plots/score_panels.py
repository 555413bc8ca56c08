"""Which dictionaries stand in which panel of the score figure. Pure: no drawing, no numbers but L0 and width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evalkit.report.rows import Source

__all__ = ["Panels", "arrange"]

_SAME_L0 = 1.5  # two dictionaries are at "one L0" when theirs differ by less than this factor


@dataclass(frozen=True, slots=True)
class Panels:
    """``by_l0`` share ``width``; ``by_width`` are near ``l0``; ``others`` lack one of both; ``left_out`` are in none."""

    width: int | None
    l0: float | None
    by_l0: tuple[Source, ...]
    by_width: tuple[Source, ...]
    rqae: tuple[Source, ...]
    controls: tuple[Source, ...]
    others: tuple[Source, ...]
    left_out: tuple[Source, ...]


def arrange(sources: Sequence[Source]) -> Panels:
    """The width with the most L0s (then the larger one), the L0 that the most widths come near (then the nearest)."""
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
    """The L0 of one of the dictionaries, and per series and width the dictionary nearest to it."""
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
