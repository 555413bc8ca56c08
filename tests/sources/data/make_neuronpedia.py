"""Writes a made-up Neuronpedia export in the layout and with the columns of the real ones; the texts are ours.

Columns: ``export-data.py`` and the converters of hijohnnylin/neuronpedia (Apache 2.0), which fill the public bucket.
Feature f fires on the f-th word. ``python -m tests.sources.data.make_neuronpedia`` writes the fixture beside this file.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ("whale", "captain", "storm", "island", "harbour", "lantern", "anchor", "compass", "sailor", "thunder")
COMMON = (
    *("the", "a", "of", "and", "to", "in", "that", "it", "was", "he", "for", "on", "with", "as", "his", "they", "be"),
    *(
        "at",
        "one",
        "have",
        "this",
        "from",
        "or",
        "had",
        "by",
        "hot",
        "but",
        "some",
        "what",
        "there",
        "we",
        "can",
        "out",
    ),
    *(
        "other",
        "were",
        "all",
        "your",
        "when",
        "up",
        "use",
        "word",
        "how",
        "said",
        "each",
        "she",
        "which",
        "do",
        "their",
    ),
)
BOS = "<bos>"
MODEL, SOURCE = "gemma-2-2b", "20-gemmascope-res-16k"


def record(index: int | str, tokens: Sequence[str], values: Sequence[float], /, **changes: Any) -> dict[str, Any]:
    """A line of ``activations``."""
    return {
        "id": f"c{index}", "modelId": MODEL, "layer": SOURCE, "index": str(index), "creatorId": "someone",
        "dataSource": None, "tokens": list(tokens), "maxValue": max(values), "minValue": min(values),
        "values": list(values), "maxValueTokenIndex": int(np.argmax(values)), "dfaValues": [], "dfaMaxValue": None,
        "dfaTargetIndex": None, "binContains": -1, "binMin": -1, "binMax": -1, **changes,
    }  # fmt: skip


def texts_of(word: str, count: int, length: int, rng: np.random.Generator) -> list[tuple[list[str], list[float]]]:
    """Texts with the word at one to three places, an active token at each; every third has a second document in it."""
    found = []
    for number in range(count):
        tokens = [f"▁{each}" for each in rng.choice(COMMON, length)]
        tokens[0] = BOS
        if number % 3 == 2:
            tokens[int(rng.choice([3, length - 4]))] = BOS
        values = [0.0] * length
        for place in rng.choice(np.arange(5, length - 5), int(rng.integers(1, 4)), replace=False).tolist():
            tokens[place], values[place] = f"▁{word}", round(float(rng.uniform(2, 9)), 3)
        found.append((tokens, values))
    return found


def lines(n_features: int, n_texts: int, length: int, seed: int = 0) -> list[dict[str, Any]]:
    """Activations of all features; feature 1's first text is recorded of feature 0 too, and of each the first one twice."""
    rng = np.random.default_rng(seed)
    found = []
    for feature in range(n_features):
        texts = texts_of(WORDS[feature], n_texts, length, rng)
        found += [record(feature, tokens, values) for tokens, values in texts]
        found.append(record(feature, *texts[0], binContains=0.3))
        if feature == 1:
            found.append(record(0, texts[0][0], [0.5 * value for value in texts[0][1]]))
    return found


def write_lines(file: Path, records: Sequence[dict[str, Any]]) -> Path:
    """A batch, packed if its name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(each) + "\n" for each in records).encode()
    file.write_bytes(gzip.compress(data, 9, mtime=0) if file.suffix == ".gz" else data)
    return file


def write_dump(root: Path, n_features: int = 10, n_texts: int = 40, length: int = 64, *, batches: int = 2) -> Path:
    """A whole export below ``root``; returns the folder of its source."""
    folder = root / MODEL / SOURCE
    records = lines(n_features, n_texts, length)
    for batch in range(batches):
        mine = [each for each in records if int(each["index"]) * batches // n_features == batch]
        write_lines(folder / "activations" / f"batch-{batch}.jsonl.gz", mine)
    common = {"modelId": MODEL, "layer": SOURCE}
    features = [{**common, "index": str(i), "maxActApprox": 9.0, "frac_nonzero": 0.001 * (i + 1), "hookName": None}
                for i in range(n_features)]  # fmt: skip
    explanations = [
        {**common, "id": f"e{i}", "index": str(i), "description": f"mentions of {WORDS[i]}s", "embedding": [0.1] * 4,
         "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini"} for i in range(n_features)
    ]  # fmt: skip
    write_lines(folder / "features" / "batch-0.jsonl.gz", features)
    write_lines(folder / "explanations" / "batch-0.jsonl.gz", explanations)
    write_lines(folder / "source.jsonl", [{"modelId": MODEL, "id": SOURCE, "setName": SOURCE.partition("-")[2]}])
    return folder


if __name__ == "__main__":
    write_dump(Path(__file__).parent / "neuronpedia", n_features=4, n_texts=6, length=24)
