"""Windows of real text as a judge gets them: the bundled corpus cut by a tokenizer, with features that fire on one token.

No model runs: a feature is active where its token stands, so marks are short, as those of most features are.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evalkit
from evalkit.corpus.token_text import token_pieces
from evalkit.records import Example, JudgeItem, ScoreExamples, TestExamples
from scorers.detection import DetectionScorer
from scorers.fuzzing import FuzzingScorer

LENGTH = 32  # tokens
EACH = 50  # positives, decoys and negatives
N_WINDOWS = 3000
EXPLANATION = 'the word "{word}" where a text explains how something works, and words of the same meaning'


def cut_windows(tokenizer: Any) -> list[tuple[str, ...]]:
    """The first windows of the corpus, at most ten of a document."""
    path = Path(evalkit.__file__).parent / "data/corpus/demo.jsonl.gz"
    windows: list[tuple[str, ...]] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"][:8000], add_special_tokens=False)["input_ids"]
            starts = range(0, len(ids) - LENGTH, LENGTH)
            windows += [token_pieces(tokenizer, ids[start : start + LENGTH]) for start in starts[:10]]
            if len(windows) >= N_WINDOWS:
                break
    return windows


def frequent_words(windows: Sequence[tuple[str, ...]], count: int) -> list[str]:
    """Tokens that are whole words of four letters or more and stand in enough windows, most frequent first."""
    found = Counter(piece for window in windows for piece in set(window))
    words = [piece for piece, _ in found.most_common() if re.fullmatch(r" [a-z]{4,}", piece)]
    return [piece for piece in words if found[piece] >= 2 * EACH][:count]


def items_of(windows: Sequence[tuple[str, ...]], word: str, seed: int = 0) -> dict[str, tuple[str, list[JudgeItem]]]:
    """By scorer: an explanation of the feature that fires on ``word``, and the items that the scorer asks about."""

    def example(number: int) -> Example:
        values = tuple(float(piece == word) for piece in windows[number])
        return Example(number, number, windows[number], values, number % 10 if any(values) else None)

    active = [number for number, window in enumerate(windows) if word in window]
    silent = [number for number, window in enumerate(windows) if word not in window]
    chosen = (active[:EACH], active[EACH : 2 * EACH], silent[:: len(silent) // EACH][:EACH])
    test = TestExamples(*(tuple(example(number) for number in numbers) for numbers in chosen))
    examples = ScoreExamples("real windows", word, 0.0, seed, test, TestExamples((), (), ()))
    explanation = EXPLANATION.format(word=word.strip())
    scorers = (DetectionScorer(), FuzzingScorer())
    return {scorer.name: (explanation, list(scorer.items(examples))) for scorer in scorers}
