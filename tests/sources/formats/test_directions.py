"""Plain directions: activations against plain numpy, what the format takes and what it leaves to others, bad files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from evalkit.collect.stage import read_examples
from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig, BadFile, BadShape, EvalkitError, MissingFile, SiteMismatch, UnknownFeature
from evalkit.pipeline.stages import run
from evalkit.protocols import CalibratedSource, FeatureSource
from evalkit.records import Site, SubjectInfo
from evalkit.registry import create, names
from evalkit.sources import open_dictionary
from evalkit.sources.formats.directions import DirectionsReader, DirectionsSource
from evalkit.store.run_store import RunStore, read_run
from tests.support import paths
from tests.support.hostile import Bomb
from tests.support.run_folders import tiny_options

D, N = 12, 7
Arrays = dict[str, np.ndarray]


def arrays(**more: np.ndarray) -> Arrays:
    rng = np.random.default_rng(0)
    return {"probe": rng.normal(size=(N, D)).astype(np.float32), **more}


BIAS = np.linspace(-1, 1, N).astype(np.float32)


def store(file: Path, values: Arrays) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npz":
        np.savez(file, **values)
    else:
        save_file(values, file)
    return file


def read(file: Path, **options: Any) -> DirectionsSource:
    (found,) = DirectionsReader().read(file, **{"site": "layers.3", "model": "toy", **options})
    return found


def states() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, 5, D)).astype(np.float32)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_activations_are_the_positive_part_of_the_projection(tmp_path: Path, suffix: str) -> None:
    source = read(store(tmp_path / f"probes{suffix}", arrays(bias=BIAS)))
    x, v = states(), arrays()["probe"]
    asked = ["4", "0", "6"]
    expected = np.maximum(np.einsum("bpd,fd->bpf", x, v[[4, 0, 6]]) + BIAS[[4, 0, 6]], 0)
    np.testing.assert_allclose(source.activations(torch.from_numpy(x), asked).numpy(), expected, atol=1e-5)
    assert source.activations(torch.from_numpy(x), []).shape == (2, 5, 0)
    assert list(source.features()) == [str(index) for index in range(N)]
    without = read(store(tmp_path / f"plain{suffix}", arrays()))
    np.testing.assert_allclose(
        without.activations(torch.from_numpy(x), ["2"]).numpy()[..., 0], np.maximum(x @ v[2], 0), atol=1e-5
    )


def test_signed_directions_are_two_features_each(tmp_path: Path) -> None:
    source = read(store(tmp_path / "probes.npz", arrays(b=BIAS)), signed=True)
    assert list(source.features())[:4] == ["0+", "0-", "1+", "1-"] and len(source.features()) == 2 * N
    x = states()
    product = x @ arrays()["probe"][3] + BIAS[3]
    found = source.activations(torch.from_numpy(x), ["3-", "3+"]).numpy()
    np.testing.assert_allclose(found[..., 1] - found[..., 0], product, atol=1e-5)
    assert (found.min(axis=-1) == 0).all() and (found >= 0).all() and (found[..., 0] > 0).any()
    assert source.info.declared["activation"] == "relu of ±(x·v + b)"


def test_it_is_calibrated_and_reconstructs_nothing(tmp_path: Path) -> None:
    source = read(store(tmp_path / "probes.npz", arrays()), density=0.05)
    assert isinstance(source, CalibratedSource) and isinstance(source, FeatureSource)
    assert (source.density, source.threshold("1"), source.reconstructs) == (0.05, 0.0, False)
    with_thresholds = source.with_thresholds({"1": 2.5})
    assert (with_thresholds.threshold("1"), source.threshold("1")) == (2.5, 0.0)
    with pytest.raises(
        BadConfig, match="expected a dictionary that reconstructs the hidden state; seen plain directions"
    ):
        source.reconstruct(torch.from_numpy(states()))


def test_name_site_and_card(tmp_path: Path) -> None:
    file = store(tmp_path / "mine" / "probes.npz", arrays(other=np.ones((3, D), np.float32), shift=BIAS))
    with pytest.raises(
        BadConfig, match=r"expected one matrix, or the option tensor= with the name of one; seen 2 matrices: other"
    ):
        read(file)
    source = read(file, tensor="probe", bias="shift", site="blocks.4.hook_resid_post")
    assert source.site == Site("toy", "layers.4") and source.bias is not None
    assert source.name == "toy/layers.4/directions/width-7/probes"
    card = {"model": "small", "site": "layers.5", "tensor": "other", "signed": True, "name": "probes of mine"}
    (file.parent / "card.json").write_text(json.dumps(card))
    (carded,) = DirectionsReader().read(file.parent)
    assert (carded.name, carded.site, len(carded.features())) == ("probes of mine", Site("small", "layers.5"), 6)
    assert (carded.info.kind, carded.info.width, carded.info.l0) == ("directions", 6, None)
    (won,) = DirectionsReader().read(file.parent, name="won", signed=False, site="layers.2")
    assert (won.name, won.site.path, len(won.features())) == ("won", "layers.2", 3)
    (file.parent / "card.json").unlink()
    with pytest.raises(BadConfig, match=r"a card\.json with a site, or the option site="):
        DirectionsReader().read(file, tensor="probe")
    with pytest.raises(
        BadConfig, match="expected the options bias, density, model, name, signed, site, subject, tensor; seen"
    ):
        read(file, depths=3)


def test_found_last_and_only_where_nothing_else_fits(tmp_path: Path) -> None:
    assert names("sources").index("directions") == max(names("sources").index(name) for name in names("sources")[:12])
    reader = create("sources", "directions")
    file = store(tmp_path / "good" / "means.safetensors", arrays(count=np.arange(N)))
    assert reader.matches(file) and reader.matches(file.parent)
    (found,) = open_dictionary(file, site="layers.1", subject="toy", density=0.02, depths=(16,))
    assert isinstance(found, DirectionsSource) and found.density == 0.02
    two = store(tmp_path / "two" / "a.npz", arrays(more=np.ones((2, D))))
    cube = store(tmp_path / "cube" / "a.npz", arrays(more=np.ones((2, 2, D))))
    flat = store(tmp_path / "flat" / "a.npz", {"v": np.ones(D)})
    marked = store(tmp_path / "marked" / "a.npz", arrays())
    (marked.parent / "cfg.json").write_text("{}")
    pair = store(tmp_path / "pair" / "a.npz", arrays())
    store(tmp_path / "pair" / "b.safetensors", arrays())
    torn = tmp_path / "torn" / "a.safetensors"
    torn.parent.mkdir()
    torn.write_bytes(b"\xff" * 100)
    (tmp_path / "torn" / "b.npz").write_bytes(b"PK\x03\x04 and no more")
    refused = [two, cube, flat, marked, marked.parent, pair.parent, torn, torn.with_name("b.npz"), Path(__file__)]
    assert not any(reader.matches(path) for path in [*refused, tmp_path, tmp_path / "none"])
    assert reader.matches(pair)
    bundled = paths.BUNDLED
    assert not any(reader.matches(path) for path in bundled.rglob("*"))


def test_matching_unpacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALKIT_CACHE", str(tmp_path / "cache"))
    np.savez_compressed(tmp_path / "probes.npz", **arrays())
    assert DirectionsReader().matches(tmp_path / "probes.npz")
    assert not (tmp_path / "cache").exists()
    np.testing.assert_array_equal(read(tmp_path / "probes.npz").vectors.read().numpy(), arrays()["probe"])


def changed(**values: Any) -> Arrays:
    return {**arrays(), **values}


@pytest.mark.parametrize(
    ("values", "options", "error", "words"),
    [
        ({"v": np.ones(D)}, {}, BadFile, ("a floating-point matrix (feature, d_model)", "v (12,)")),
        ({"v": np.ones((3, D), np.int64)}, {}, BadFile, ("no floating-point tensor",)),
        (arrays(), {"tensor": "nope"}, BadFile, ("nope", "seen only probe")),
        (changed(bias=BIAS), {"tensor": "bias"}, BadShape, ("bias", "shape (any, any)", "(7,)")),
        (changed(bias=BIAS), {"bias": "b"}, BadFile, ("b: expected a floating-point tensor with this name",)),
        (changed(c=np.ones(3)), {"bias": "c"}, BadShape, ("c", "shape (7)", "(3,)")),
        (changed(bias=np.full(N, np.nan)), {}, BadFile, ("bias", "finite", "7 of 7")),
        ({"probe": np.ones((0, D), np.float32)}, {}, BadShape, ("probe", "(0, 12)")),
        (arrays(), {"signed": "yes"}, BadConfig, ("signed: true or false", "'yes'")),
        (arrays(), {"density": 1.5}, BadConfig, ("density between 0 and 1", "1.5")),
        (arrays(), {"density": True}, BadConfig, ("density between 0 and 1", "True")),
    ],
)
def test_bad_contents_are_named(
    tmp_path: Path, values: Arrays, options: dict[str, Any], error: type[EvalkitError], words: tuple[str, ...]
) -> None:
    for suffix in (".npz", ".safetensors"):
        file = store(tmp_path / f"probes{suffix}", values)
        with pytest.raises(error) as caught:
            read(file, **options)
        assert str(file) in str(caught.value)
        for word in words:
            assert word in str(caught.value)


def test_a_row_that_is_not_finite_is_found_when_it_is_read(tmp_path: Path) -> None:
    values = arrays()
    values["probe"][2, 5] = np.nan
    source = read(store(tmp_path / "probes.npz", values))
    hidden = torch.from_numpy(states())
    assert source.activations(hidden, ["1", "3"]).isfinite().all()
    with pytest.raises(BadFile, match=r"probes.npz: probe: expected finite numbers; seen 1 of 24"):
        source.activations(hidden, ["1", "2"])


def test_pickles_do_not_run_and_torn_files_are_named(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    pickled = np.empty((N, D), dtype=object)
    pickled[0, 0] = Bomb(mark)
    file = store(tmp_path / "objects.npz", {"probe": pickled})
    with pytest.raises(BadFile, match="pickled objects"):
        read(file)
    for suffix in (".npz", ".safetensors"):
        plain = tmp_path / f"plain{suffix}"
        plain.write_bytes(pickle.dumps(Bomb(mark)))
        whole = store(tmp_path / f"whole{suffix}", arrays()).read_bytes()
        for data in (plain.read_bytes(), b"", whole[:60], whole[:-20]):
            plain.write_bytes(data)
            assert not DirectionsReader().matches(plain) or data == whole[:-20]
            with pytest.raises(BadFile, match=f"plain{suffix}"):
                read(plain)
    assert not mark.exists()


def subject(d_model: int, *sites: str) -> SubjectInfo:
    return SubjectInfo("toy", d_model, 4, np.ones(d_model, np.float32), 1e-6, sites)


def test_another_subject_or_feature_is_refused(tmp_path: Path) -> None:
    source = read(store(tmp_path / "probes.npz", arrays()))
    assert source.bind(subject(D, "layers.3")) is source
    with pytest.raises(SiteMismatch, match=r"expected a subject model with the module path layers.3"):
        source.bind(subject(D, "layers.1"))
    with pytest.raises(SiteMismatch, match="expected a subject model with d_model 12"):
        source.bind(subject(16))
    with pytest.raises(BadShape, match=r"expected a matrix \(feature, d_model\) of width 7; seen shape \(7, 12\)"):
        source.bind(subject(N))
    with pytest.raises(SiteMismatch, match=r"expected states of width 12 at layers.3; seen width 3"):
        source.activations(torch.zeros(1, 2, 3), ["0"])
    signed = read(tmp_path / "probes.npz", signed=True)
    for one, wrong in ((source, "7"), (source, "0+"), (source, "-1"), (source, "01"), (signed, "0"), (signed, "7-")):
        with pytest.raises(UnknownFeature, match="expected 0"):
            one.activations(torch.from_numpy(states()), [wrong])
        with pytest.raises(UnknownFeature):
            one.threshold(wrong)


def test_a_run_on_signed_directions(tiny_llama: Path, tmp_path: Path) -> None:
    """Through the whole first stage: the active share of tokens is the density, and examples hold the excess over θ."""
    options = tiny_options(tmp_path, tiny_llama)
    vectors = np.random.default_rng(2).normal(size=(6, 32)).astype(np.float32)
    store(tmp_path / "probes" / "probes.npz", {"v": vectors})
    (tmp_path / "probes" / "card.json").write_text(json.dumps({"site": "layers.3", "signed": True}))
    changes = {"dictionaries": (str(tmp_path / "probes"),), "controls": ("shuffled",)}
    run(RunConfig.create(**{**options, **changes}), tmp_path / "run", stages=("collect",))
    frames = read_run(tmp_path / "run")
    name = f"{tiny_llama.name}/layers.3/directions/width-12/probes"
    assert frames.sources["name"].tolist() == [name]
    assert frames.features["density"].between(0.03, 0.08).all() and (frames.features["threshold"] > 0).all()
    with RunStore.open(tmp_path / "run") as records:
        found = read_examples(records, 0)[name]
    assert found and all(example.peak > 0 for one in found.values() for example in one.score.test.positives)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="seen no such file or folder"):
        read(tmp_path / "none")
    with pytest.raises(MissingFile, match="or a folder with one such file; seen an empty folder"):
        read(tmp_path)
    store(tmp_path / "a.npz", arrays())
    store(tmp_path / "b.npz", arrays())
    with pytest.raises(MissingFile, match=r"seen a\.npz, b\.npz; fix: give the path of the file"):
        read(tmp_path)
