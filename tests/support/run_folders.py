"""Run folders for tests: one with simulated judgements, and what a quick real run on a tiny random model needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evalkit.config.run_config import RunConfig
from evalkit.evaluate.score_stage import Test
from evalkit.protocols import Judge, Scorer
from evalkit.records import Judgement, Score, SourceInfo
from evalkit.store.frames import RunFrames
from evalkit.store.run_store import RunStore
from evalkit.store.tables import FeatureRow
from tests.support.dictionaries import write_rqae, write_sae
from tests.support.simulated import simulate

WORDS = ["whale", "ship", "sea", "deck", "calm", "night", "storm", "sailor", "captain", "island", "wind", "boat", "oar"]


def write_run(folder: Path, frames: RunFrames | None = None) -> RunFrames:
    """Write the frames (by default a small simulated run) as a finished run; returns them."""
    frames = frames or simulate(n_features=6, n_each=6)
    identity = RunConfig.create(model="simulated", dictionaries=("simulated",)).identity()
    with RunStore.create(folder, identity) as store:
        rows = frames.sources.astype(object).where(frames.sources.notna(), None).to_dict("records")
        infos = [SourceInfo(r["name"], r["kind"], r["site"], r["width"], r["l0"], r["depth"]) for r in rows]
        store.write_sources(infos, [{} for _ in infos])
        for source, group in frames.features.groupby("source"):
            store.write_features(
                source,
                [
                    FeatureRow(
                        source, row.feature, i, row.status, row.reason, row.density, 0.0, 1.0, 1.0, row.window_share
                    )
                    for i, row in enumerate(group.itertuples())
                ],
            )
        keys = ["source", "feature", "scorer", "explainer", "judge", "control", "repeat"]
        for key, group in frames.judgements.groupby(keys):
            source, feature, scorer, *_ = key
            judgements = tuple(
                Judgement(row.item, row.window, bool(row.label), None if row.match is None else bool(row.match),
                          row.confidence, None, row.item % 10 if row.label else None,
                          None if row.match is not None else "simulated")
                for row in group.astype(object).where(group.notna(), None).itertuples()
            )  # fmt: skip
            score = Score(source, feature, scorer, "1", judgements)
            store.write_score(key, score, judge_version="1")
    return frames


def each_with_each(judges: Mapping[str, Judge], scorers: Sequence[Scorer]) -> list[Test]:
    """Every scorer with every judge."""
    return [Test(scorer.name, scorer, name, judge) for name, judge in judges.items() for scorer in scorers]


def tiny_options(folder: Path, model: Path) -> dict[str, object]:
    """Options of a run over an SAE and an RQAE of two depths, on 80 documents of words in random order: seconds."""
    generator = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(generator.choice(WORDS, 160)) + "."}) for _ in range(80)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    write_sae(folder / "sae", 32, 64, 10)
    write_rqae(folder / "rqae", 32, 8, model="tiny-llama", site="layers.3")
    return {
        "model": str(model),
        "dictionaries": (str(folder / "sae"), str(folder / "rqae")),
        "corpus": str(folder / "text.jsonl"),
        "depths": (2, 8),
        "density": 0.05,
        "n_features": 6,
        "n_explain": 8,
        "n_positives": 5,
        "n_negatives": 5,
        "calibration_contexts": 40,
        "dtype": "float32",
        "force": True,  # random dictionaries fit nothing
    }
