"""The pieces of a text that an embedding judge compares with an explanation: runs of three consecutive words.

Pure functions of text and marks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from evalkit.records import Span

__all__ = ["WORDS_PER_PIECE", "competing", "pieces"]

WORDS_PER_PIECE = 3
_WORD = re.compile(r"\S+")


@lru_cache(maxsize=1 << 16)
def pieces(text: str) -> tuple[tuple[str, Span], ...]:
    """Every run of three consecutive words (separated by white space), with its character range.

    White space between words becomes one space. A text of fewer than three words, or of white space only, is one piece.
    """
    found = [match.span() for match in _WORD.finditer(text)]
    if len(found) <= WORDS_PER_PIECE:
        return ((" ".join(text.split()), (0, len(text))),)
    ends = zip(found, found[WORDS_PER_PIECE - 1 :], strict=False)
    return tuple((" ".join(text[start:end].split()), (start, end)) for (start, _), (_, end) in ends)


def competing(text: str, marks: Sequence[Span] | None) -> list[str]:
    """The pieces of a text that are compared with the explanation: all pieces, or with marks, those that overlap a mark.

    For a mark that overlaps no piece (white space at either end of the text), the nearest piece is used. If ``marks`` is
    empty, the list is empty.
    """
    every = pieces(text)
    if marks is None:
        return [piece for piece, _ in every]
    chosen: set[int] = set()
    for start, end in marks:
        overlapping = {index for index, (_, (a, b)) in enumerate(every) if a < end and start < b}
        chosen |= overlapping or {min(range(len(every)), key=lambda index: _distance(every[index][1], (start, end)))}
    return [every[index][0] for index in sorted(chosen)]


def _distance(left: Span, right: Span) -> int:
    return max(left[0] - right[1], right[0] - left[1])
