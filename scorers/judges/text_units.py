"""The words and punctuation of a window, and what its tokens take over from them, for judges that know words only.

Pure functions of text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from evalkit.markup import token_spans
from evalkit.records import Span

__all__ = ["spread", "units"]

_UNIT = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")


@lru_cache(maxsize=1 << 14)
def units(text: str) -> tuple[tuple[str, Span], ...]:
    """Every word (with apostrophes inside) and every run of punctuation, with its character range."""
    return tuple((match.group(), match.span()) for match in _UNIT.finditer(text))


def spread(tokens: Sequence[str], spans: Sequence[Span], values: Sequence[float]) -> tuple[float, ...]:
    """For every token the largest of the values whose character range in the joined tokens it overlaps; 0 for none.

    A token without text (a later byte of a character) takes what the place it stands at is inside of.
    """
    valued = list(zip(spans, values, strict=True))
    return tuple(
        max((value for (a, b), value in valued if a < end and start < b), default=0.0)
        for start, end in token_spans(tokens)
    )
