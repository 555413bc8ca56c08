from __future__ import annotations

import torch

from evalkit.collect.build_controls import build_controls, reference_of
from evalkit.collect.calibration import Calibration
from evalkit.collect.select_features import select_features
from evalkit.sources.controls import PermutedSource, PlantedSource, RandomDirectionsSource
from tests.support.relu_dictionaries import SUBJECT, ReluSource, run_config, word
from tests.support.table_states import SITE


def test_controls_are_matched_to_the_middle_dictionary(calibration: Calibration) -> None:
    sources = [ReluSource(20), ReluSource(40, 2.0), ReluSource(40, 3.0), ReluSource(40, 9.0)]
    selected = select_features(run_config(), sources, calibration, [])
    reference = reference_of(selected)
    assert reference is not None and reference.source.name.endswith("width-40/l0-3")
    random, planted, permuted = build_controls(run_config(), selected, calibration, word, SUBJECT)
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
    wanted = (ReluSource(40).activations(tokens, reference.features) > 0).float().mean(0)
    assert (fires <= wanted + 1e-3).all()  # a token that ties with the threshold is not active
    assert (wanted - fires).max() < 0.015  # and a common token is 1.25% of all
    assert isinstance(planted.source, PlantedSource)
    assert all(feature.startswith("w") and len(feature) == 5 for feature in planted.features)
    assert isinstance(permuted.source, PermutedSource)
    assert permuted.features == reference.features
