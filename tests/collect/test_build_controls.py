from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from evalkit.collect.activations import SelectedFeatures
from evalkit.collect.build_controls import build_controls, reference_of
from evalkit.collect.calibration import Calibration
from evalkit.collect.select_features import select_features
from evalkit.errors import BadConfig
from evalkit.records import CONTROL_KIND, SourceInfo
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


@dataclass(frozen=True)
class Claiming(ReluSource):
    """A dictionary of a plug-in that says of itself that it is a control."""

    own_name: str = f"{SITE}/null-planted"
    own_kind: str = "null-planted"

    @property
    def name(self) -> str:
        return self.own_name

    @property
    def info(self) -> SourceInfo:
        return SourceInfo(self.name, self.own_kind, self.site.path, self.width, self.l0)


@pytest.mark.parametrize("kind", ["null-planted", "null-permuted", "null-", "null-null-planted"])
def test_a_kind_that_a_dictionary_declares_makes_it_no_control(kind: str) -> None:
    info = SelectedFeatures(Claiming(own_kind=kind), ("0",)).info
    assert info.kind == f"declared-{kind}" and not info.kind.startswith(CONTROL_KIND)
    for sound in ("sae", "rqae", "nullable", "null"):
        assert SelectedFeatures(Claiming(own_kind=sound), ("0",)).info.kind == sound


def test_the_controls_of_a_run_are_marked_by_the_run(calibration: Calibration) -> None:
    selected = select_features(run_config(), [ReluSource()], calibration, [])
    controls = build_controls(run_config(), selected, calibration, word, SUBJECT)
    assert [one.control for one in selected] == [False] and controls and all(one.control for one in controls)
    assert all(one.info.kind.startswith(CONTROL_KIND) for one in controls)


def test_a_dictionary_with_the_name_of_a_control_of_the_run_is_refused(calibration: Calibration) -> None:
    selected = select_features(run_config(), [Claiming()], calibration, [])
    with pytest.raises(BadConfig) as caught:
        build_controls(run_config(), selected, calibration, word, SUBJECT)
    assert str(caught.value) == (
        f"{SITE}/null-planted: expected a dictionary with another name than the control of this run; seen a dictionary and "
        "a control of this name; fix: give the dictionary another name in its card.json, or leave the control out of "
        "--controls"
    )
    assert PlantedSource(SITE, {}).name == f"{SITE}/null-planted"
