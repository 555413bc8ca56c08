"""The result of measuring one part, before it is saved, printed or drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

__all__ = ["Measured", "Rows"]

Rows: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """The rows of a part's table, further data for its figure, and notes to print below (see ``cache.Part``)."""

    rows: Rows
    further: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
