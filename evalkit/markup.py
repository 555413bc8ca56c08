"""Marks: which tokens of a window are marked, where the marks lie in its text, and how they are written and taken out.

A mark is written ``<<…>>``. Pure functions of tokens and numbers: it knows nothing of models, prompts or disk.

Writing is exact for every text, even one that holds ``<<`` or ``>>`` itself: ``parse(render(text, spans))`` gives both
back. Where two equal brackets of the text (or one of them and a mark) would touch, a backslash is put between them, and
where backslashes stand there already, one more; taking marks out removes exactly that backslash.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence

from evalkit.errors import InputError
from evalkit.records import Span

__all__ = ["levels", "marked_tokens", "parse", "quoted", "render", "runs", "spans", "strip", "token_spans", "words"]

MARK_SHARE = 0.3  # of the way from the threshold to the window's peak
TOP_LEVEL = 10

# what chat templates use to say who speaks, in the families of models in use
_CONTROL = re.compile(
    r"<(?=[|｜]|/?(?:s|bos|eos|pad|unk|mask|think|tool_call|(?:start|end)_of_(?:turn|image))>)"
    r"|\[(?=/?(?:INST|[A-Z]+_[A-Z_]+)\])"
)
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_PIECE = re.compile(r"(?P<open><<)|(?P<close>>>)|(?P<guarded>([<>])\\+(?=\4))")


def quoted(value: str | Sequence[str]) -> str:
    """A text (or texts) of others as JSON for a prompt: it cannot end its own quotes, nor hold a template's control token.

    The first character of what would be one, such as ``<|im_end|>``, is written as ``\\u003c``.
    """
    text = json.dumps(value if isinstance(value, str) else list(value), ensure_ascii=False)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def marked_tokens(activations: Sequence[float], threshold: float, share: float = MARK_SHARE) -> tuple[bool, ...]:
    """Which tokens of a window carry a mark: those above θ + share · (peak − θ), the peak being the window's own.

    Nothing is marked when the peak is not above the threshold θ; otherwise the peak always is.
    """
    peak = max(activations, default=-math.inf)
    if not peak > threshold:
        return (False,) * len(activations)
    cut = threshold + share * (peak - threshold)
    return tuple(value > cut or value == peak for value in activations)


def levels(activations: Sequence[float], threshold: float, peak: float) -> tuple[int, ...]:
    """Activations as integers 0–10: the excess over the threshold relative to ``peak``, the feature's largest activation.

    0 is kept for tokens that are not active (at or below the threshold); an active token gets at least 1.
    """
    return tuple(_level(value, threshold, peak) for value in activations)


def _level(value: float, threshold: float, peak: float) -> int:
    if not value > threshold:
        return 0
    if value >= peak:
        return TOP_LEVEL
    return max(1, math.floor(TOP_LEVEL * (value - threshold) / (peak - threshold) + 0.5))


def runs(flags: Sequence[bool]) -> tuple[Span, ...]:
    """The maximal runs of marked tokens, as half-open ranges of token positions."""
    edges = [i for i in range(len(flags) + 1) if (i > 0 and flags[i - 1]) != (i < len(flags) and flags[i])]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def token_spans(tokens: Sequence[str]) -> tuple[Span, ...]:
    """The character range of each token in the concatenation of all of them."""
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    return tuple(itertools.pairwise(ends))


def spans(tokens: Sequence[str], flags: Sequence[bool]) -> tuple[Span, ...]:
    """The character ranges of the runs of marked tokens, in order and apart from each other, none of them empty.

    White space at the start of a run stays outside of the mark, because tokenizers glue it to the word that follows. A
    run of nothing but white space is marked as it is: the feature does fire there. A run without text (later bytes of a
    character that belongs to an earlier token) takes the nearest token with text before it, else after it.
    """
    bounds = token_spans(tokens)
    text = "".join(tokens)
    found: list[Span] = []
    for first, last in runs(flags):
        start, end = bounds[first][0], bounds[last - 1][1]
        if start == end:
            after = next((span for span in bounds[last:] if span[0] < span[1]), None)
            before = next((span for span in reversed(bounds[:first]) if span[0] < span[1]), None)
            start, end = before or after or (start, end)
        run = text[start:end]
        if run.strip():
            start = end - len(run.lstrip())
        if start == end:
            continue
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return tuple(found)


def words(text: str) -> tuple[Span, ...]:
    """The character ranges of the words of a text: letters, digits and underscores, with apostrophes inside."""
    return tuple(match.span() for match in _WORD.finditer(text))


def render(text: str, marks: Sequence[Span]) -> str:
    """The text with ``<<`` and ``>>`` around each mark. ``strip`` gives the text back, ``parse`` the marks too.

    Raises InputError for marks that are empty, overlap, are out of order or reach outside of the text.
    """
    position, parts = 0, []
    for start, end in marks:
        if not position <= start < end <= len(text):
            raise InputError(
                f"mark ({start}, {end})",
                expected=f"a non-empty range between {position} and {len(text)}",
                seen=f"({start}, {end})",
                fix="give marks in order, without overlaps, inside the text",
            )
        parts += [_guard(text[position:start], before="<"), "<<", _guard(text[start:end], before=">"), ">>"]
        position = end
    return "".join([*parts, _guard(text[position:], before="")])


def _guard(chunk: str, before: str) -> str:
    """Keep brackets of the text from reading as marks; ``before`` is the bracket of the mark that follows the chunk."""
    for bracket in "<>":
        follows = rf"(?={bracket}|\Z)" if bracket == before else rf"(?={bracket})"
        chunk = re.sub(rf"{bracket}(\\*){follows}", rf"{bracket}\\\g<1>", chunk)
    return chunk


def parse(marked: str) -> tuple[str, tuple[Span, ...]]:
    """The text and the marks that ``render`` wrote. Raises InputError where marks do not pair."""
    text, position = "", 0
    marks: list[Span] = []
    start: int | None = None
    for piece in _PIECE.finditer(marked):
        text += marked[position : piece.start()]
        position = piece.end()
        if piece["guarded"]:
            text += piece["guarded"][:-1]
        elif (piece["open"] is None) == (start is None):
            raise InputError(
                "marked text",
                expected="<< and >> in pairs",
                seen=f"{piece.group()} at character {piece.start()} without its partner",
                fix="write marks with evalkit.markup.render",
            )
        elif start is None:
            start = len(text)
        else:
            marks.append((start, len(text)))
            start = None
    if start is not None:
        raise InputError(
            "marked text",
            expected="<< and >> in pairs",
            seen="a << without >>",
            fix="write marks with evalkit.markup.render",
        )
    return text + marked[position:], tuple(marks)


def strip(marked: str) -> str:
    """The text without its marks: exactly the one that ``render`` was given."""
    return _PIECE.sub(lambda piece: piece["guarded"][:-1] if piece["guarded"] else "", marked)
