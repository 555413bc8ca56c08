from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from evalkit.collect.calibration import Calibration
from evalkit.collect.select_features import select_features
from evalkit.errors import BadConfig, CorpusError
from tests.support.relu_dictionaries import ReluSource, run_config


def test_features_are_drawn_among_the_alive_ones(calibration: Calibration) -> None:
    (source, *_) = select_features(run_config(), [ReluSource()], calibration, [])
    assert len(source.features) == 8
    assert all(int(feature) % 2 == 0 for feature in source.features)
    assert 0.3 < source.measured["alive_share"] < 0.8
    again = select_features(run_config(), [ReluSource()], calibration, [])
    assert again[0].features == source.features
    other = select_features(run_config(seed=1), [ReluSource()], calibration, [])
    assert set(other[0].features) != set(source.features)


def test_a_dictionary_that_never_fires_is_refused(calibration: Calibration) -> None:
    class Silent(ReluSource):
        def activations(self, hidden: torch.Tensor, features: Sequence[str]) -> torch.Tensor:
            return torch.zeros(*hidden.shape[:2], len(features))

    with pytest.raises(CorpusError, match="expected features that fire on the corpus; seen none of 40 on 100 contexts"):
        select_features(run_config(), [Silent()], calibration, [])


def test_two_dictionaries_of_one_name_are_refused(calibration: Calibration) -> None:
    with pytest.raises(
        BadConfig, match="expected a different name for every dictionary; seen two dictionaries of this name"
    ):
        select_features(run_config(), [ReluSource(), ReluSource()], calibration, [])
