"""Splits a window into words and punctuation, and maps their values to tokens. For judges that work on words.

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
    """Per token, the largest value of the spans that overlap it; 0 if no span does.

    ``tokens``: the texts of the tokens.
    ``spans``: character ranges of the concatenated tokens.
    ``values``: one value per span.

    An empty token (a later byte of a character) takes the value of the span that contains its position.
    """
    valued = list(zip(spans, values, strict=True))
    return tuple(
        max((value for (a, b), value in valued if a < end and start < b), default=0.0)
        for start, end in token_spans(tokens)
    )
