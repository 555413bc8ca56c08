import json

import numpy as np
import pytest
import torch

from evalkit.errors import BadConfig, BadFile, BadShape, InputError, MissingFile, SiteMismatch, UnknownFeature
from evalkit.protocols import CalibratedSource, CentredSource, FeatureSource
from evalkit.records import SubjectInfo
from evalkit.sources import load_source, open_dictionary
from evalkit.sources.rqae.source import RqaeReader, random_codes_source
from rqae import RQAE, RqaeConfig
from rqae.features import intensity_literal
from tests.support.random_rqae import random_rqae

CARD = {"model": "tiny", "site": "layers.2", "name": "rqae-12", "fvu": 0.1, "fvu_by_depth": {"4": 0.4}}
EPS = 1e-5


def subject(gain: np.ndarray, **changes) -> SubjectInfo:
    values = {"model": "tiny", "d_model": 16, "n_layers": 4, "norm_gain": gain.astype(np.float32), "norm_eps": EPS}
    return SubjectInfo(**(values | {"sites": tuple(f"layers.{i}" for i in range(4))} | changes))


GAIN = 1 + 0.3 * np.random.default_rng(0).standard_normal(16)
INFO = subject(GAIN)
HIDDEN = 20 * torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my-rqae"
    random_rqae(RqaeConfig(16, num_quantizers=12)).save_pretrained(path)
    (path / "card.json").write_text(json.dumps(CARD))
    return path


@pytest.fixture
def sources(folder):
    found = RqaeReader().read(folder, depths=(4, 12))
    return [source.bind(INFO).with_centres(HIDDEN[0, :3], ["a", "b", "c"]) for source in found]


def normed(hidden: torch.Tensor) -> torch.Tensor:
    x = hidden.numpy().astype(np.float64)
    return torch.from_numpy(x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * GAIN).float()


def test_one_source_per_depth(sources):
    shallow, deep = sources
    for source in sources:
        assert isinstance(source, FeatureSource)
        assert isinstance(source, CentredSource) and isinstance(source, CalibratedSource)
    assert shallow.name == "tiny/layers.2/rqae/rqae-12/depth-4"
    assert (shallow.info.kind, shallow.info.width, shallow.info.depth, shallow.info.l0) == ("rqae", 12, 4, 4)
    assert shallow.info.declared == {"fvu": 0.4} and deep.info.declared == {"fvu": 0.1}
    assert shallow.info.site == "layers.2" and str(shallow.site) == "tiny/layers.2"
    assert shallow.features() == deep.features() == ("a", "b", "c")  # equal ids, so the depths pair


def test_activations_are_the_intensity_of_final_normed_states(sources, folder):
    model = RQAE.from_pretrained(folder)
    tokens = model.encode(normed(HIDDEN).reshape(-1, 16))
    for source in sources:
        expected = intensity_literal(model, tokens, tokens[:3], source.depth).reshape(2, 10, 3)
        found = source.activations(HIDDEN, ["a", "b", "c"])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(source.activations(HIDDEN, ["c", "a"]), expected[..., [2, 0]], rtol=0, atol=2e-6)
        torch.testing.assert_close(found[0, :3].diagonal(), torch.ones(3), rtol=0, atol=1e-5)
        assert source.activations(HIDDEN, []).shape == (2, 10, 0)


def test_reconstruct_undoes_the_norm(sources, folder):
    model = RQAE.from_pretrained(folder)
    x = normed(HIDDEN)
    scale = torch.rsqrt(HIDDEN.square().mean(-1, keepdim=True) + EPS)
    for source in sources:
        expected = model.decode(model.encode(x), source.depth) / torch.from_numpy(GAIN).float() / scale
        torch.testing.assert_close(source.reconstruct(HIDDEN), expected, rtol=1e-4, atol=1e-4)


def test_a_gain_of_zero_reconstructs_as_zero(folder):
    gain = GAIN.copy()
    gain[5] = 0
    source = RqaeReader().read(folder, depths=12)[0].bind(subject(gain))
    found = source.reconstruct(HIDDEN)
    assert found.isfinite().all() and (found[..., 5] == 0).all()


def test_depths_share_one_encoding(sources, monkeypatch):
    calls = []
    encode = RQAE.encode
    monkeypatch.setattr(RQAE, "encode", lambda self, x, depth=None: calls.append(depth) or encode(self, x, depth))
    hidden = HIDDEN + 1
    first = [source.activations(hidden, ["a"]) for source in sources]
    again = [source.activations(hidden.clone(), ["a"]) for source in sources]
    assert calls == [12]
    hidden[0, 0, 0] += 100  # the content counts, not the tensor
    changed = [source.activations(hidden, ["a"]) for source in sources]
    assert calls == [12, 12]
    for one, two, three in zip(first, again, changed, strict=True):
        assert torch.equal(one, two) and not torch.equal(one, three)


def test_thresholds(sources):
    source = sources[0]
    with pytest.raises(BadConfig, match=r"expected a threshold \(a quantile of the feature's intensity over tokens\)"):
        source.threshold("a")
    marked = source.with_thresholds({"a": 0.25, "b": -0.5})
    assert marked.threshold("a") == 0.25 and marked.threshold("b") == -0.5
    with pytest.raises(UnknownFeature):
        source.with_thresholds({"z": 0.0})


def test_unknown_features_and_unbound_sources(sources, folder):
    with pytest.raises(UnknownFeature) as error:
        sources[0].activations(HIDDEN, ["a", "z"])
    assert str(error.value) == (
        "feature 'z' of tiny/layers.2/rqae/rqae-12/depth-4: expected one of its 3 features; seen 'z'; "
        "fix: choose one of features()"
    )
    fresh = RqaeReader().read(folder, depths=4)[0]
    assert fresh.features() == ()
    with pytest.raises(UnknownFeature, match="set features first: call with_centres"):
        fresh.threshold("a")
    with pytest.raises(BadConfig, match="call bind first"):
        fresh.reconstruct(HIDDEN)
    with pytest.raises(BadConfig, match="seen an id more than once"):
        sources[0].with_centres(HIDDEN[0, :2], ["a", "a"])
    with pytest.raises(BadShape, match=r"expected shape \(2, 4 or more\); seen \(2, 3\)"):
        sources[0].with_features(["a", "b"], torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(BadShape, match="expected 0 to 624"):
        sources[0].with_features(["a"], torch.full((1, 4), 700))


def test_states_that_are_not_finite(sources):
    hidden = HIDDEN.clone()
    hidden[1, 2, 0] = torch.nan
    with pytest.raises(InputError, match="RQAE input row 12"):
        sources[0].activations(hidden, ["a"])
    with pytest.raises(BadShape):
        sources[0].activations(HIDDEN[..., :15], ["a"])


def test_bind_checks_the_subject(folder):
    source = RqaeReader().read(folder, depths=4)[0]
    with pytest.raises(SiteMismatch, match="expected a subject model with d_model 16"):
        source.bind(subject(np.ones(8), d_model=8))
    with pytest.raises(SiteMismatch, match=r"expected a subject model with the module path layers\.2"):
        source.bind(subject(GAIN, sites=("layers.0",)))
    with pytest.raises(BadConfig, match="RMS norm"):
        source.bind(subject(np.zeros(0)))


def test_names_come_from_card_options_or_folder(folder):
    read = RqaeReader().read
    assert read(folder, depths=4, name="other")[0].name == "tiny/layers.2/rqae/other/depth-4"
    assert read(folder, depths=4, site="layers.3")[0].name == "tiny/layers.3/rqae/rqae-12/depth-4"
    (folder / "card.json").write_text(json.dumps(CARD | {"name": "tiny/layers.2/rqae"}))
    assert read(folder, depths=4)[0].name == "tiny/layers.2/rqae/depth-4"
    (folder / "card.json").unlink()
    with pytest.raises(BadConfig, match=r"expected a card\.json with a site, or the option site="):
        read(folder, model="m")
    with pytest.raises(BadConfig, match="the option model="):
        read(folder, site="layers.1")
    assert read(folder, site="layers.1", subject="m", depths=4)[0].name == "m/layers.1/rqae/my-rqae/depth-4"


def test_bad_depths_density_options_and_files(folder, tmp_path):
    read = RqaeReader().read
    with pytest.raises(BadConfig) as error:
        read(folder, depths=(4, 16))
    assert str(error.value) == (
        f"{folder}: expected depths from 1 to 12, its number of quantizers; seen 4, 16; fix: pass depths=(12,)"
    )
    with pytest.raises(BadConfig, match="density"):
        read(folder, depths=4, density=0)
    with pytest.raises(BadConfig, match="seen widths"):
        read(folder, depths=4, widths=3)
    with pytest.raises(MissingFile):
        read(tmp_path / "nowhere")
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(BadFile, match="expected a safetensors file"):
        read(folder, depths=4)
    (folder / "card.json").write_text("{")
    with pytest.raises(BadFile, match="expected a JSON card"):
        read(folder, depths=4)


def test_opened_through_the_registry(folder, tmp_path):
    assert [source.depth for source in open_dictionary(folder, depths=(12, 4), l0=3)] == [4, 12]
    assert load_source(folder / "config.json", depths=4).depth == 4
    with pytest.raises(BadConfig, match="expected one dictionary; seen 2"):
        load_source(folder, depths=(4, 12))
    (folder / "config.json").write_text('{"dim": 3}')
    assert not RqaeReader().matches(folder)


def test_random_codes_are_a_null(sources):
    null = random_codes_source(sources[0], 5, seed=1)
    assert null.name == "tiny/layers.2/null-random-codes/depth-4" and null.info.kind == "null-random-codes"
    values = null.activations(HIDDEN, null.features())
    assert values.shape == (2, 10, 5) and float(values.abs().max()) < 1
