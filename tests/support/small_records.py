"""A little record of every kind, to fill a run's tables with."""

from __future__ import annotations

from evalkit.records import Explanation, Judgement, Score, SourceInfo
from evalkit.store.run_store import RunStore
from evalkit.store.tables import FeatureRow, ScoreKey

IDENTITY = {"model": "m", "depths": (16, 64), "seed": 0}
SOURCE = SourceInfo("m/layers.1/sae", "sae", "layers.1", width=8, l0=2.5)


def score(feature: str, n: int = 4) -> Score:
    judgements = tuple(
        Judgement(
            item, 100 + item, item % 2 == 0, None if item == 3 else True, 0.5, None, None, "odd" if item == 3 else None
        )
        for item in range(n)
    )
    return Score(SOURCE.name, feature, "detection", "1", judgements, 0.4)


def key(feature: str, explainer: str = "words", control: str = "", repeat: int = 0) -> ScoreKey:
    return (SOURCE.name, feature, "detection", explainer, "embedding", control, repeat)


def fill(store: RunStore) -> None:
    store.write_sources([SOURCE], [{"fvu_measured": 0.25}])
    rows = [
        FeatureRow(SOURCE.name, "3", 0, "ok", None, 0.01, 0.0, 4.0, 3.0),
        FeatureRow(SOURCE.name, "5", 1, "ineligible", "rare", 0.0001, 0.0, 1.0, 0.0),
    ]
    store.write_features(SOURCE.name, rows)
    store.write_explanation(Explanation(SOURCE.name, "3", "words", "1", "cats"))
    store.write_score(key("3", "words", ""), score("3"), judge_version="2")
