"""Places false marks that match true ones in number, lengths and positions, on tokens where the feature is inactive.

Pure functions of activations and a random generator. A judge must be able to recognise false marks only by the text that
they cover. False marks therefore have the number and lengths of the window's true marked runs, and their positions are
drawn from those of the feature's true marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from evalkit.markup import marked_tokens, runs, token_spans, words
from evalkit.records import Example, Span

__all__ = ["admissible_tokens", "false_marks", "start_counts", "true_marks"]

MARGIN_WORDS = 1  # words between an active token and a false mark
ROOMY = 0.8  # the margin is kept only if it leaves at least this share of the true marks' starts
Form: TypeAlias = tuple[bool, bool, bool, bool]
_ATTEMPTS = 64  # random placements tried before a window counts as having no room


def true_marks(example: Example, threshold: float) -> tuple[bool, ...]:
    """Which tokens of the window carry a true mark; see ``evalkit.markup.marked_tokens``."""
    return marked_tokens(example.activations, threshold)


def start_counts(examples: Sequence[Example], threshold: float) -> NDArray[np.int64]:
    """How often a true marked run starts at each token position, over all windows. Shape (longest window,)."""
    counts = np.zeros(max((len(example.tokens) for example in examples), default=0), dtype=np.int64)
    for example in examples:
        for start, _ in runs(true_marks(example, threshold)):
            counts[start] += 1
    return counts


def admissible_tokens(example: Example, threshold: float, margin_words: int = 0) -> NDArray[np.bool_]:
    """Flags of tokens that a false mark may cover: not empty, not active, and not in a word with an active token.

    Tokens in the ``margin_words`` words before and after such a word are excluded too. Shape (token,).
    """
    bounds = token_spans(example.tokens)
    active = [span for span, value in zip(bounds, example.activations, strict=True) if value > threshold]
    taken = [_neighbourhood(span, words(example.text), margin_words) for span in active]
    return np.array(
        [
            start < end and not value > threshold and not any(start < b and a < end for a, b in taken)
            for (start, end), value in zip(bounds, example.activations, strict=True)
        ],
        dtype=bool,
    )


def _neighbourhood(span: Span, in_words: Sequence[Span], margin: int) -> Span:
    """The character range of the words that the span overlaps and of ``margin`` more words on either side."""
    touched = [(a, b) for a, b in in_words if span[0] < b and a < span[1]]
    start, end = min([span[0], *(a for a, _ in touched)]), max([span[1], *(b for _, b in touched)])
    before = [a for a, b in in_words if b <= start]
    after = [b for a, b in in_words if a >= end]
    if margin and before:
        start = before[-margin:][0]
    if margin and after:
        end = after[:margin][-1]
    return start, end


def false_marks(
    example: Example, threshold: float, starts: NDArray[np.int64], generator: np.random.Generator
) -> tuple[bool, ...] | None:
    """False marks for this window, as a flag per token, or None if there is no room.

    The false runs have the number and lengths of the window's true runs, lie on admissible tokens, and neither overlap nor
    touch. If there is room, a false run also has the form of its true run: like the true run, it begins and ends at the
    edge of a word or within a word, and contains letters or not. Otherwise a mark that splits a word or covers a comma
    could be recognised as false by its appearance.

    The start of each run is drawn from the positions that are still possible, with the frequencies in ``starts`` (see
    ``start_counts``). If all of these have frequency 0, a start is drawn from all of ``starts`` and the nearest possible
    position is used.

    False marks stay one word away from active tokens, because activation often spills over to the next word and a mark
    there would be half right. The margin is dropped if it leaves no room, or if it excludes more than a fifth of the true
    marks' starts, because matching their positions matters more.
    """
    flags = true_marks(example, threshold)
    forms = _Forms(example)
    shapes = [(end - start, forms.of(start, end)) for start, end in runs(flags)]
    if not shapes:
        return None
    shapes.sort(key=lambda shape: -shape[0])  # long runs first: they have the fewest places
    near, clear = (admissible_tokens(example, threshold, margin) for margin in (0, MARGIN_WORDS))
    choices = (clear, near) if 0 < ROOMY * _mass(near, starts) <= _mass(clear, starts) else (near,)
    for free in choices:
        for _ in range(_ATTEMPTS):
            placed = _place(forms, shapes, free, starts, generator)
            if placed is not None:
                return tuple(placed.tolist())
    return None


def _mass(free: NDArray[np.bool_], starts: NDArray[np.int64]) -> int:
    """The number of true marks that start at the positions of the free tokens."""
    padded = np.zeros(len(free), dtype=np.int64)
    shared = min(len(free), len(starts))
    padded[:shared] = starts[:shared]
    return int(padded[free].sum())


class _Forms:
    """The forms of runs of tokens in a window: how a run looks, regardless of its meaning."""

    def __init__(self, example: Example) -> None:
        self._text, self._bounds = example.text, token_spans(example.tokens)
        self._cuts = {place for a, b in words(example.text) for place in range(a + 1, b)}  # within a word
        self._letters = {place for a, b in words(example.text) for place in range(a, b)}
        self._known: dict[Span, Form] = {}

    def of(self, start: int, end: int) -> Form:
        """Whether tokens ``start`` to ``end`` are blank, contain letters, begin within a word, end within a word."""
        if (start, end) not in self._known:
            a, b = self._bounds[start][0], self._bounds[end - 1][1]
            letters = any(place in self._letters for place in range(a, b))
            self._known[start, end] = (not self._text[a:b].strip(), letters, a in self._cuts, b in self._cuts)
        return self._known[start, end]


def _place(
    forms: _Forms,
    shapes: Sequence[tuple[int, Form]],
    free: NDArray[np.bool_],
    starts: NDArray[np.int64],
    generator: np.random.Generator,
) -> NDArray[np.bool_] | None:
    """The flags of one random attempt to place all runs; None if a run has no place left."""
    marked = np.zeros(len(free), dtype=bool)
    room = free.copy()
    for length, form in shapes:
        found = [start for start in range(len(room) - length + 1) if room[start : start + length].all()]
        alike = [start for start in found if forms.of(start, start + length) == form]
        solid = [start for start in found if form[0] or not forms.of(start, start + length)[0]]
        possible = np.array(alike or solid, dtype=np.int64)
        if not len(possible):
            return None
        start = _draw(possible, starts, generator)
        marked[start : start + length] = True
        room[max(0, start - 1) : start + length + 1] = False
    return marked


def _draw(possible: NDArray[np.int64], starts: NDArray[np.int64], generator: np.random.Generator) -> int:
    padded = np.zeros(max(len(starts), int(possible.max()) + 1), dtype=np.float64)
    padded[: len(starts)] = starts
    weights = padded[possible]
    if weights.sum() > 0:
        return int(generator.choice(possible, p=weights / weights.sum()))
    if padded.sum() == 0:
        return int(generator.choice(possible))
    wanted = generator.choice(len(padded), p=padded / padded.sum())
    distance = np.abs(possible - wanted)
    return int(generator.choice(possible[distance == distance.min()]))
