"""A run's frames as a real run makes them, from a simulated judge.

Negatives come from one pool of windows shared by features, some features are too rare, some answers are missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import numpy as np
import pandas as pd

from evalkit.store.frames import RunFrames

SITE = "smollm2/layers.15"
# name, kind, width, l0, depth, skill of the explanations (in units of the judge's noise)
SOURCES: list[tuple[str, str, int | None, float | None, int | None, float]] = [
    ("smollm2/layers.15/rqae/depth-16", "rqae", None, None, 16, 0.26),
    ("smollm2/layers.15/rqae/depth-64", "rqae", None, None, 64, 0.32),
    ("smollm2/layers.15/rqae/depth-256", "rqae", None, None, 256, 0.29),
    ("smollm2/layers.15/sae/1k/l0-32", "sae", 1024, 31.2, None, 0.22),
    ("smollm2/layers.15/sae/2k/l0-16", "sae", 2048, 16.4, None, 0.30),
    ("smollm2/layers.15/sae/2k/l0-32", "sae", 2048, 33.1, None, 0.26),
    ("smollm2/layers.15/sae/2k/l0-64", "sae", 2048, 62.8, None, 0.18),
    ("smollm2/layers.15/sae/4k/l0-32", "sae", 4096, 32.4, None, 0.30),
    ("null/random-directions", "null-random-directions", 576, None, None, 0.06),
    ("null/permuted", "null-permuted", 2048, None, None, 0.0),
    ("null/planted", "null-planted", 64, None, None, 2.0),
]
NAMES = [row[0] for row in SOURCES]
POOL = 400  # windows that negatives are drawn from


def generator(*names: object) -> np.random.Generator:
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def simulate(
    n_features: int = 50,
    n_each: int = 20,
    unscored: float = 0.01,
    names: Collection[str] = NAMES,
    scorers: Collection[str] = ("detection", "fuzzing"),
) -> RunFrames:
    sources = [row for row in SOURCES if row[0] in names]
    features, judgements = [], []
    for name, kind, *_, skill in sources:
        rng = generator(name)
        ids = [str(number) for number in rng.choice(10_000, n_features, replace=False)]
        rare = set(rng.choice(ids, rng.integers(1, 4), replace=False).tolist()) if n_features > 4 else set()
        for feature in ids:
            status, reason = ("ineligible", "too few active windows") if feature in rare else ("ok", None)
            density = rng.uniform(0.001, 0.02) / 5  # rarer than an RQAE's
            features.append((name, feature, 0.01 if kind == "rqae" else density, status, reason))
            if feature not in rare:
                judgements += _judged(rng, name, feature, skill, n_each, unscored, scorers)
    columns = ["source", "feature", "density", "status", "reason"]
    frame = pd.DataFrame(judgements, columns=["window", "label", "match", "confidence", "item", *_KEYS])
    frame = frame.assign(match=frame["match"].astype("boolean"), probability=None, decile=None, reason=None, repeat=0)
    frame["moments"] = None
    frame.loc[frame["match"].isna(), "reason"] = "no answer"
    table = pd.DataFrame([row[:5] for row in sources], columns=["name", "kind", "width", "l0", "depth"]).assign(
        site=SITE
    )
    return RunFrames(
        sources=table.astype({"width": "Int64", "depth": "Int64", "l0": "float64"}),
        features=pd.DataFrame(features, columns=columns).assign(window_share=0.1),
        judgements=frame,
        meta={"protocol": "1", "cost": {"judge calls": len(frame), "USD": 0.0}},
    )


_KEYS = ("source", "feature", "scorer", "scorer_version", "explainer", "judge", "control")
_WINDOW_EFFECT = generator("windows").normal(0, 0.4, 60_000)


def _judged(
    rng: np.random.Generator, name: str, feature: str, skill: float, n: int, unscored: float, scorers: Collection[str]
) -> list[tuple[object, ...]]:
    windows = np.concatenate([1000 + rng.choice(50_000, n, replace=False), rng.choice(POOL, n, replace=False)])
    label = np.arange(2 * n) < n
    ability = rng.normal(skill, 0.5 * skill)
    rows: list[tuple[object, ...]] = []
    for scorer in scorers:
        strength = 0.8 if scorer == "fuzzing" else 1.0
        for control in ("", "shuffled"):
            mean = 0.02 if control else ability * strength
            noise = rng.normal(size=2 * n) + _WINDOW_EFFECT[windows]
            confidence = 0.3 + 0.1 * (noise + np.where(label, 2 * mean, 0))
            lost = rng.random(2 * n) < unscored
            match = [
                None if gone else bool(value > 0.3 + 0.1 * mean) for gone, value in zip(lost, confidence, strict=True)
            ]
            confidence[lost] = np.nan
            cells = zip(windows.tolist(), label.tolist(), match, confidence.tolist(), range(2 * n), strict=True)
            rows += [(*cell, name, feature, scorer, "1", "words", "embedding", control) for cell in cells]
    return rows
