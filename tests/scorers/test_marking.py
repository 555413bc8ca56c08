"""False marks: same shapes, silent tokens only, the positions of true marks, different in every window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from evalkit.markup import marked_tokens, runs, spans
from evalkit.records import Example
from scorers.marking import admissible_tokens, false_marks, start_counts
from tests.support.builders import random_test, window

THETA = 0.5


def lengths(flags: tuple[bool, ...]) -> list[int]:
    return sorted(end - start for start, end in runs(flags))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_same_shapes_on_silent_tokens(seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = tuple(random.choice([" whale", "s", " sea", ",", "\n", "", " of", "'s"], size=24).tolist())
    values = tuple((random.random(24) * (random.random(24) < 0.25)).tolist())
    example = Example(0, 0, tokens, values, decile=0)
    true = marked_tokens(values, THETA)
    false = false_marks(example, THETA, start_counts([example], THETA), random)
    if false is None:
        return
    assert lengths(false) == lengths(true)
    assert all(values[i] <= THETA and tokens[i] for i, flag in enumerate(false) if flag)
    assert len(spans(tokens, false)) == len(runs(false))  # every run is visible, none runs into another
    text = "".join(tokens)
    for (a, b), shape in zip(spans(tokens, false), lengths(false), strict=True):
        assert text[a:b].strip() or shape  # a blank false run only where a true one is blank, tested below


def test_no_false_mark_in_the_word_of_an_active_token() -> None:
    tokens = (" un", "believ", "able", " tale", ",", " don", "'t")
    example = Example(0, 0, tokens, (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0), decile=0)
    assert admissible_tokens(example, THETA).tolist() == [False, False, False, True, True, False, False]
    # active but under the mark's cut counts as active too
    weak = Example(0, 0, (" a", " b", " c"), (0.0, 0.6, 9.0), decile=0)
    assert admissible_tokens(weak, THETA).tolist() == [True, False, False]


def test_white_space_is_marked_falsely_only_where_it_is_marked_truly() -> None:
    tokens = (" a", "\n", "\n", "\n", " b")
    word = Example(0, 0, tokens, (1.0, 0.0, 0.0, 0.0, 0.0), decile=0)
    for seed in range(20):
        assert false_marks(word, THETA, np.array([0, 9, 9, 9, 1]), np.random.default_rng(seed)) == (
            False,
            False,
            False,
            False,
            True,
        )
    blank = Example(0, 0, (" a", "\n", " b", "\n"), (0.0, 1.0, 0.0, 0.0), decile=0)
    drawn = {false_marks(blank, THETA, np.ones(4, dtype=np.int64), np.random.default_rng(s)) for s in range(30)}
    assert (False, False, False, True) in drawn


def test_positions_differ_between_windows_and_follow_the_true_ones() -> None:
    """The trap of re-seeding per example gave every negative the same positions."""
    test = random_test(400, seed=1, starts=[2, 3, 5, 8, 9, 14, 15, 20, 21, 26, 27, 28])
    active = [*test.positives, *test.decoys]
    counts = start_counts(active, THETA)
    true_starts, false_starts, seen = np.zeros(32, int), np.zeros(32, int), set()
    for example in test.decoys:
        false = false_marks(example, THETA, counts, np.random.default_rng([7, example.window]))
        assert false is not None
        seen.add(false)
        for start, _ in runs(false):
            false_starts[start] += 1
        for start, _ in runs(marked_tokens(example.activations, THETA)):
            true_starts[start] += 1
    assert len(seen) > 200
    used = (true_starts + false_starts) > 0
    _, p, _, _ = chi2_contingency(np.stack([true_starts[used], false_starts[used]]))
    assert p > 0.001  # measured on one fixed seed; a uniform draw fails with p < 1e-20
    uniform = np.bincount(np.random.default_rng(0).integers(0, 31, false_starts.sum()), minlength=32)
    assert chi2_contingency(np.stack([true_starts, uniform])[:, (true_starts + uniform) > 0])[1] < 1e-20


def test_the_nearest_place_where_no_true_position_is_free() -> None:
    example = window(0, [0, 1])  # always at the start of the window: tokens 0 and 1
    counts = np.zeros(32, dtype=np.int64)
    counts[0] = 5
    false = false_marks(example, THETA, counts, np.random.default_rng(0))
    assert false is not None and runs(false) == ((2, 4),)


@pytest.mark.parametrize("active", [range(32), range(17), [*range(0, 32, 2), 31]])
def test_no_room(active: range) -> None:
    example = window(0, list(active))
    assert false_marks(example, THETA, start_counts([example], THETA), np.random.default_rng(0)) is None


def test_a_silent_window_has_no_false_marks() -> None:
    assert false_marks(window(0), THETA, np.zeros(0, dtype=np.int64), np.random.default_rng(0)) is None


@pytest.mark.parametrize("fires", [" whale", "ly", ","])
def test_a_false_mark_looks_like_a_true_one(fires: str) -> None:
    """Whole words for a feature of whole words, endings for one of endings, punctuation for one of that."""
    random = np.random.default_rng(0)
    kinds = {" whale": (" whale", " ship", " calm", " sea"), "ly": ("ly", "ness", "ing"), ",": (",", ".", ";")}
    alike = kinds[fires]
    seen = set()
    for index in range(60):
        tokens: list[str] = []
        for word in random.permutation([" whale", " ship", " calm", " sea", " slow", " quick", " bright"]).tolist():
            tokens += [word] if word in kinds[" whale"] else [word, str(random.choice(["ly", "ness", "ing"]))]
            tokens += [str(random.choice([",", ".", ";"]))] if random.random() < 0.6 else []
        tokens += [",", ".", ";"]
        values = [0.0] * len(tokens)
        if fires not in tokens:
            continue
        values[tokens.index(fires)] = 1.0
        example = Example(index, index, tuple(tokens), tuple(values), decile=0)
        false = false_marks(example, THETA, np.ones(len(tokens), np.int64), random)
        assert false is not None
        seen |= {tokens[place] for place, flag in enumerate(false) if flag}
    assert len(seen) > 1 and seen <= set(alike)
