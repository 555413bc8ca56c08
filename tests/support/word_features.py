"""Features that fire on one word each, in the text that comes with the package: a collected run without a subject model."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import evalkit
from evalkit.collect.example_files import ExampleRow, ExampleStore
from evalkit.config.run_config import RunConfig
from evalkit.records import Example, ExplainExamples, FeatureExamples, ScoreExamples, SourceInfo, TestExamples
from evalkit.store.run_store import RunStore
from evalkit.store.tables import FeatureRow

SOURCE = "words/one-each"
SHOWN, EACH, WINDOW = 5, 8, 14


@cache
def windows() -> list[tuple[str, ...]]:
    """The text cut into windows of as many words, white space with the word that follows."""
    path = Path(evalkit.__file__).parent / "data/corpus/demo.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return [
        tuple(pieces[first : first + WINDOW])
        for pieces in (re.findall(r"\s*\S+", text) for text in texts)
        for first in range(0, len(pieces) - WINDOW, WINDOW)
    ]


def make_examples(count: int) -> dict[str, dict[str, FeatureExamples]]:
    """``count`` features with ``SHOWN`` windows to explain, and tests of ``EACH`` positives, decoys and negatives."""
    places: dict[str, list[int]] = defaultdict(list)
    for number, window in enumerate(windows()):
        for word in {piece.strip() for piece in window if re.fullmatch(r"\s*[a-z]{5,9}", piece)}:
            places[word].append(number)
    enough = sorted(word for word in places if len(places[word]) >= SHOWN + 2 * EACH)
    chosen = enough[:: len(enough) // count][:count]
    return {SOURCE: {word: _feature(word, places[word]) for word in chosen}}


def _feature(word: str, places: list[int]) -> FeatureExamples:
    cut = windows()

    def examples(numbers: list[int]) -> tuple[Example, ...]:
        return tuple(
            Example(number, 0, cut[number], tuple(float(piece.strip() == word) for piece in cut[number]), 5)
            for number in numbers
        )

    silent = [number for number in range(0, len(cut), 97) if word not in "".join(cut[number]).lower()]
    shown, active, decoys = places[:SHOWN], places[SHOWN : SHOWN + EACH], places[SHOWN + EACH : SHOWN + 2 * EACH]
    test = TestExamples(examples(active), examples(decoys), examples(silent[:EACH]))
    return FeatureExamples(
        ExplainExamples(SOURCE, word, 0.0, 1.0, examples(shown)), ScoreExamples(SOURCE, word, 0.0, 1, test, test)
    )


def collected(folder: Path, count: int, **options: Any) -> tuple[RunStore, RunConfig]:
    """A run folder as its first stage leaves it, open to write; ``options`` go into the configuration."""
    config = RunConfig.create(model="none", dictionaries=("none",), **options)
    features = make_examples(count)[SOURCE]
    store = RunStore.create(folder, config.identity())
    store.write_sources([SourceInfo(SOURCE, "sae", "layers.1", count, 1.0, None)], [{}])
    rows = [FeatureRow(SOURCE, word, n, "ok", None, 0.0, 0.0, 1.0, 1.0) for n, word in enumerate(features)]
    store.write_features(SOURCE, rows)
    _write_examples(ExampleStore(folder / "examples"), features)
    store.write_stage("collect", 0.0, {})
    return store, config


def _write_examples(files: ExampleStore, features: dict[str, FeatureExamples]) -> None:
    rows, used = [], {}
    for word, examples in features.items():
        test = examples.score.test
        roles = {
            "explain.shown": examples.explain.positives,
            "test.positive": test.positives,
            "test.decoy": test.decoys,
            "test.negative": test.negatives,
        }
        for role, shown in roles.items():
            for rank, one in enumerate(shown):
                used[one.window] = one.tokens
                values = np.array(one.activations, dtype=np.float32)
                rows.append(ExampleRow(word, role, rank, 0, one.window, one.decile, values))  # type: ignore[arg-type]
    files.folder.mkdir(parents=True, exist_ok=True)
    files.write_source(0, SOURCE, rows)
    ids, tokens = np.array(list(used), dtype=np.int64), list(used.values())
    grid: Any = SimpleNamespace(ids=ids, documents=np.zeros_like(ids))
    files.write_windows(grid, np.arange(len(ids)), lambda row: tokens[row])
