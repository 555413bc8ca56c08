"""Checks whether a group of texts can have an odd one out. Shared by all judges that pick. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from evalkit.records import JudgeItem

__all__ = ["why_no_pick"]

_FEWEST_TEXTS = 3  # of two texts, neither is the odd one out


def why_no_pick(group: Sequence[JudgeItem]) -> str | None:
    """The reason why no text of the group can be picked; None if one can."""
    if len(group) < _FEWEST_TEXTS:
        return f"fewer than {_FEWEST_TEXTS} texts, so none is the odd one out"
    return None if all(item.text for item in group) else "a text of the group is empty"
