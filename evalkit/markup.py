"""Marks in windows: chooses the tokens to mark, locates the marks in the text, and writes, parses and removes them.

A mark is written ``<<…>>``. Pure functions of tokens and numbers; does not know models, prompts or files.

Writing is lossless for every text, even a text that contains ``<<`` or ``>>``: ``parse(render(text, spans))`` returns
both. Where two equal brackets of the text, or a bracket and a mark, would touch, a backslash is inserted between them. If
there are backslashes already, one more is added. Parsing and stripping remove exactly that backslash.
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

MARK_SHARE = 0.3  # tokens are marked above this fraction of the way from the threshold to the window's peak
TOP_LEVEL = 10  # of the integer activations shown to explainers

# beginnings of the control tokens of chat templates (turns, roles, special tokens), in the common model families
_CONTROL = re.compile(
    r"<(?=[|｜]|/?(?:s|bos|eos|pad|unk|mask|think|tool_call|(?:start|end)_of_(?:turn|image))>)"
    r"|\[(?=/?(?:INST|[A-Z]+_[A-Z_]+)\])"
)
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_PIECE = re.compile(r"(?P<open><<)|(?P<close>>>)|(?P<guarded>([<>])\\+(?=\4))")


def quoted(value: str | Sequence[str]) -> str:
    """Untrusted text (or a list of texts) as JSON for a prompt, so that it cannot end its own quotes.

    It cannot contain control tokens of chat templates either: the first character of a string such as ``<|im_end|>`` is
    written as ``\\u003c``.
    """
    text = json.dumps(value if isinstance(value, str) else list(value), ensure_ascii=False)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def marked_tokens(activations: Sequence[float], threshold: float, share: float = MARK_SHARE) -> tuple[bool, ...]:
    """Which tokens of a window are marked: those above θ + share · (peak − θ), where the peak is that of the window.

    If the peak exceeds the threshold θ, its token is always marked; otherwise no token is.
    """
    peak = max(activations, default=-math.inf)
    if not peak > threshold:
        return (False,) * len(activations)
    cut = threshold + share * (peak - threshold)
    return tuple(value > cut or value == peak for value in activations)


def levels(activations: Sequence[float], threshold: float, peak: float) -> tuple[int, ...]:
    """Activations as integers from 0 to 10: the excess over the threshold, as a fraction of the excess of ``peak``.

    ``peak``: the feature's largest activation.

    Tokens at or below the threshold get 0; active tokens get at least 1.
    """
    return tuple(_level(value, threshold, peak) for value in activations)


def _level(value: float, threshold: float, peak: float) -> int:
    if not value > threshold:
        return 0
    if value >= peak:
        return TOP_LEVEL
    return max(1, math.floor(TOP_LEVEL * (value - threshold) / (peak - threshold) + 0.5))


def runs(flags: Sequence[bool]) -> tuple[Span, ...]:
    """The maximal runs of consecutive marked tokens, as half-open ranges of token positions."""
    edges = [i for i in range(len(flags) + 1) if (i > 0 and flags[i - 1]) != (i < len(flags) and flags[i])]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def token_spans(tokens: Sequence[str]) -> tuple[Span, ...]:
    """The character range of each token in the concatenated text."""
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    return tuple(itertools.pairwise(ends))


def spans(tokens: Sequence[str], flags: Sequence[bool]) -> tuple[Span, ...]:
    """The character ranges of the runs of marked tokens: in order, disjoint and not empty.

    White space at the start of a run is left outside the mark, because tokenizers attach it to the following word. A run
    of white space only is marked as a whole, because the feature does fire there. A run without text (later bytes of a
    character that belongs to an earlier token) marks the nearest token with text before it, or if there is none, after it.
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
    """The character ranges of the words of a text: runs of letters, digits and underscores; apostrophes only inside."""
    return tuple(match.span() for match in _WORD.finditer(text))


def render(text: str, marks: Sequence[Span]) -> str:
    """The text with ``<<`` and ``>>`` around each mark. ``strip`` recovers the text; ``parse`` also recovers the marks.

    Raises InputError if marks are empty, overlap, are out of order or reach beyond the text.
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
    """Escape brackets of the text that would read as marks. ``before``: the bracket that follows the chunk, "" for none."""
    for bracket in "<>":
        follows = rf"(?={bracket}|\Z)" if bracket == before else rf"(?={bracket})"
        chunk = re.sub(rf"{bracket}(\\*){follows}", rf"{bracket}\\\g<1>", chunk)
    return chunk


def parse(marked: str) -> tuple[str, tuple[Span, ...]]:
    """The text and the marks that were given to ``render``. Raises InputError if ``<<`` and ``>>`` are not in pairs."""
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
    """The text without its marks, exactly as it was given to ``render``."""
    return _PIECE.sub(lambda piece: piece["guarded"][:-1] if piece["guarded"] else "", marked)
