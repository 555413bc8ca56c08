from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evalkit.collect.calibration import Calibration, calibrate, choose_centres
from evalkit.collect.preparation import prepare, reference_of
from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig, CorpusError
from evalkit.records import Site, SourceInfo, SubjectInfo
from evalkit.sources.controls import PermutedSource, PlantedSource, RandomDirectionsSource
from tests.collect.test_activations import D_MODEL, SITE, TableStates, pools_of
from tests.corpus.test_windows import ArrayCorpus, random_corpus

SUBJECT = SubjectInfo("m", D_MODEL, 2, np.ones(D_MODEL, dtype=np.float32), 1e-6)


@dataclass(frozen=True)
class ReluSource:
    """A little dictionary: relu(h·W − b); odd features can never fire."""

    width: int = 40
    l0: float = 3.0
    site: Site = SITE

    @property
    def name(self) -> str:
        return f"{self.site}/sae/width-{self.width}/l0-{self.l0:g}"

    @property
    def info(self) -> SourceInfo:
        return SourceInfo(self.name, "sae", self.site.path, self.width, self.l0)

    def bind(self, subject: SubjectInfo) -> ReluSource:
        return self

    def features(self) -> Sequence[str]:
        return [str(index) for index in range(self.width)]

    def activations(self, hidden: torch.Tensor, features: Sequence[str]) -> torch.Tensor:
        weights = torch.randn(D_MODEL, self.width, generator=torch.Generator().manual_seed(self.width))
        bias = torch.tensor([9.0, 1e9]).repeat(self.width // 2)
        picked = [int(feature) for feature in features]
        return (hidden @ weights[:, picked] - bias[picked]).clamp(min=0)

    def threshold(self, feature: str) -> float:
        return 0.0

    def reconstruct(self, hidden: torch.Tensor) -> torch.Tensor:
        return 0.5 * hidden


@pytest.fixture
def corpus() -> ArrayCorpus:
    """Half of the positions hold one of 40 common tokens."""
    corpus = random_corpus(n=400)
    common = np.random.default_rng(1).integers(100, 140, corpus.tokens.shape)
    return replace(
        corpus, tokens=np.where(np.random.default_rng(2).random(corpus.tokens.shape) < 0.5, common, corpus.tokens)
    )


@pytest.fixture
def calibration(corpus: ArrayCorpus, tmp_path: Path) -> Calibration:
    return calibrate(
        corpus, TableStates(), tmp_path / "c.safetensors", sites=[SITE.path], n_contexts=100,
        centres=choose_centres(corpus, pools_of(corpus, 0), 5, 0), seed=0,
    )  # fmt: skip


def config(**options: object) -> RunConfig:
    base = {
        "model": "m",
        "dictionaries": ("d",),
        "n_features": 8,
        "n_positives": 10,
        "context_length": 64,
        "window_length": 16,
    }
    return RunConfig.create(**{**base, **options})


def word(token: int) -> str:
    """Tokens 100–139 are five-letter words, the rest numbers."""
    return f" w{chr(97 + token % 26)}{chr(97 + token // 26)}ox" if 100 <= token < 140 else str(token)


def test_features_are_drawn_among_the_alive_ones(calibration: Calibration) -> None:
    (source, *_) = prepare(config(), [ReluSource()], SUBJECT, calibration, [], word)
    assert len(source.chosen.features) == 8
    assert all(int(feature) % 2 == 0 for feature in source.chosen.features)
    assert 0.3 < source.measured["alive_share"] < 0.8
    again = prepare(config(), [ReluSource()], SUBJECT, calibration, [], word)
    assert again[0].chosen.features == source.chosen.features
    other = prepare(config(seed=1), [ReluSource()], SUBJECT, calibration, [], word)
    assert set(other[0].chosen.features) != set(source.chosen.features)


def test_controls_are_matched_to_the_middle_dictionary(calibration: Calibration) -> None:
    sources = [ReluSource(20), ReluSource(40, 2.0), ReluSource(40, 3.0), ReluSource(40, 9.0)]
    prepared = prepare(config(), sources, SUBJECT, calibration, [], word)
    reference = reference_of(prepared[:4])
    assert reference is not None and reference.chosen.source.name.endswith("width-40/l0-3")
    random, planted, permuted = (one.chosen for one in prepared[4:])
    assert isinstance(random.source, RandomDirectionsSource)
    tokens = torch.cat(
        [calibration.hidden(b)[SITE.path][torch.from_numpy(b.valid)] for b in calibration.sample_batches()]
    )
    fires = (
        (
            random.source.activations(tokens, random.features)
            > torch.tensor([random.source.threshold(f) for f in random.features])
        )
        .float()
        .mean(0)
    )
    wanted = (ReluSource(40).activations(tokens, reference.chosen.features) > 0).float().mean(0)
    assert (fires <= wanted + 1e-3).all()  # a token that ties with the threshold is not active
    assert (wanted - fires).max() < 0.015  # and a common token is 1.25% of all
    assert isinstance(planted.source, PlantedSource)
    assert all(feature.startswith("w") and len(feature) == 5 for feature in planted.features)
    assert isinstance(permuted.source, PermutedSource)
    assert permuted.features == reference.chosen.features


def test_a_dictionary_that_never_fires_is_refused(calibration: Calibration) -> None:
    class Silent(ReluSource):
        def activations(self, hidden: torch.Tensor, features: Sequence[str]) -> torch.Tensor:
            return torch.zeros(*hidden.shape[:2], len(features))

    with pytest.raises(CorpusError, match="expected features that fire on the corpus; seen none of 40 on 100 contexts"):
        prepare(config(), [Silent()], SUBJECT, calibration, [], word)


def test_two_dictionaries_of_one_name_are_refused(calibration: Calibration) -> None:
    with pytest.raises(
        BadConfig, match="expected a name of its own for every dictionary; seen two dictionaries of this name"
    ):
        prepare(config(), [ReluSource(), ReluSource()], SUBJECT, calibration, [], word)
