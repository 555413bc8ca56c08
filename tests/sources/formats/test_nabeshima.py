"""Matryoshka SAEs of N. Nabeshima: what their own code computes, a literal definition, what broken files give."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evalkit.errors import BadConfig, BadFile, BadShape, EvalkitError, MissingFile
from evalkit.records import Site
from evalkit.registry import create
from evalkit.sources.formats.nabeshima import NabeshimaReader, read_weights
from evalkit.util.tensor_files import Stored
from tests.support.hostile import Bomb, cut
from tests.support.paths import SOURCES_DATA

DATA = SOURCES_DATA / "nabeshima"
SUBSET = [3, 4, 20]
AVERAGE = "normalizer.running_avg"
D, N = 6, 16
Tensors = dict[str, torch.Tensor]


def tensors(**changed: torch.Tensor | None) -> Tensors:
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "sq_act_running_avg": (N,)}
    found: dict[str, torch.Tensor | None] = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    found |= {AVERAGE: torch.tensor([7.5])}
    found |= {AVERAGE if name == "average" else name: value for name, value in changed.items()}
    return {name: value for name, value in found.items() if value is not None}


def store(file: Path, values: Tensors | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    values = tensors() if values is None else values
    if file.suffix == ".safetensors":
        save_file(values, file)
    else:
        torch.save(values, file)
    return file


@pytest.mark.parametrize("name", ["layers.2.pt", "layers.3.safetensors"])
def test_activations_are_upstreams_but_for_one_factor(name: str) -> None:
    """Upstream's factor is the average over the root of how many latents are asked for."""
    (source,) = NabeshimaReader().read(DATA / name, model="toy")
    expected = np.load(DATA / f"{Path(name).stem}.expected.npz")
    hidden = torch.from_numpy(expected["x"])[None]
    average = math.sqrt(hidden.shape[-1]) / read_weights(DATA / name)[1].factor
    every = source.activations(hidden, source.features())[0].numpy()
    np.testing.assert_allclose(every * average / math.sqrt(source.weights.width), expected["activations"], atol=1e-5)
    some = source.activations(hidden, [str(each) for each in SUBSET])[0].numpy()
    np.testing.assert_allclose(some * average / math.sqrt(len(SUBSET)), expected["subset"], atol=1e-5)
    np.testing.assert_allclose(some, every[:, SUBSET], atol=1e-6)
    assert 0.01 < (expected["activations"] > 0).mean() < 0.99 and (expected["subset"] > 0).any()
    assert "matryoshka-saes" in json.loads((DATA / "made_by.json").read_text())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_encode_and_reconstruct_as_defined(tmp_path: Path, suffix: str) -> None:
    values = tensors()
    (source,) = NabeshimaReader().read(store(tmp_path / f"layers.4{suffix}", values), model="toy")
    arrays = {name: value.double().numpy() for name, value in values.items()}
    for token in np.random.default_rng(1).normal(size=(5, D)):
        scaled = token * math.sqrt(D) / 7.5
        active = [max(float(scaled @ arrays["W_enc"][:, each] + arrays["b_enc"][each]), 0.0) for each in range(N)]
        lengths = [math.sqrt(sum(value**2 for value in arrays["W_dec"][each])) for each in range(N)]
        output = arrays["b_dec"] + sum(active[each] * arrays["W_dec"][each] for each in range(N))
        hidden = torch.from_numpy(token)[None, None]
        found = source.activations(hidden, source.features())[0, 0].numpy()
        np.testing.assert_allclose(found, np.multiply(active, lengths), atol=1e-5)
        np.testing.assert_allclose(source.reconstruct(hidden)[0, 0].numpy(), output * 7.5 / math.sqrt(D), atol=1e-5)


def test_sites_names_and_cards(tmp_path: Path) -> None:
    (named,) = NabeshimaReader().read(store(tmp_path / "blocks.3.hook_resid_pre" / "final.pt"), model="toy")
    assert (named.site, named.name, named.l0) == (Site("toy", "layers.2"), "toy/layers.2/sae/width-16/final", None)
    assert named.transform() == f"scale {math.sqrt(D) / 7.5:.4g}"
    assert isinstance(named.weights.w_enc, Stored) and isinstance(named.weights.w_dec, Stored)
    (given,) = NabeshimaReader().read(
        named_file := store(tmp_path / "x" / "final.pt"), site="layers.1", subject="s", l0=30
    )
    assert (given.site, given.name) == (Site("s", "layers.1"), "s/layers.1/sae/width-16/l0-30")
    card = {"model": "toy", "site": "layers.5.mlp", "l0": 30.5, "name": "known", "fvu": 0.1}
    (named_file.parent / "card.json").write_text(json.dumps(card))
    (carded,) = NabeshimaReader().read(named_file)
    assert (carded.site, carded.name, carded.l0) == (Site("toy", "layers.5.mlp"), "known", 30.5)
    assert carded.info.declared == {"l0": 30.5, "fvu": 0.1}
    both = NabeshimaReader().read(DATA, model="toy")
    assert [source.site.path for source in both] == ["layers.2", "layers.3"]
    assert len({source.name for source in both}) == 2


def test_registry_knows_it_and_it_recognises_its_files(tmp_path: Path) -> None:
    reader = create("sources", "nabeshima")
    file = store(tmp_path / "a" / "b" / "mine.pth")
    assert all(reader.matches(path) for path in (DATA, DATA / "layers.2.pt", file, tmp_path))
    other = store(tmp_path / "other" / "one.pt", {"W_enc": torch.ones(3, 3)})
    (tmp_path / "other" / "torn.pt").write_bytes(b"PK\x03\x04 and no archive")
    (tmp_path / "other" / f"{AVERAGE}.txt").write_text(AVERAGE)
    assert not any(reader.matches(path) for path in (other, other.parent, tmp_path / "none"))


def test_without_the_running_average_of_squares(tmp_path: Path) -> None:
    weights, scale = read_weights(store(tmp_path / "layers.1.pt", tensors(sq_act_running_avg=None)))
    assert (weights.width, weights.decoder_scaled) == (N, True)
    assert scale.factor == pytest.approx(math.sqrt(D) / 7.5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"W_dec": None}, BadFile, ("W_dec", "seen only W_enc, b_dec, b_enc")),
        ({"average": None}, BadFile, (AVERAGE, "a floating-point tensor with this name")),
        ({"average": torch.zeros(1)}, BadFile, (AVERAGE, "the mean norm of a state, above 0", "seen 0")),
        ({"average": torch.tensor([-2.0])}, BadFile, (AVERAGE, "above 0", "seen -2")),
        ({"average": torch.tensor([torch.inf])}, BadFile, (AVERAGE, "finite numbers", "1 of 1")),
        ({"average": torch.ones(2)}, BadShape, (AVERAGE, "shape (1)", "shape (2,)")),
        ({"W_enc": torch.ones(D)}, BadShape, ("W_enc", "shape (any, any)", "shape (6,)")),
        ({"W_enc": torch.ones(0, N)}, BadShape, ("W_enc", "shape (any, any)", "shape (0, 16)")),
        ({"W_dec": torch.ones(D, N)}, BadShape, ("W_dec", "shape (16, 6)", "shape (6, 16)")),
        ({"b_enc": torch.ones(D)}, BadShape, ("b_enc", "shape (16)", "shape (6,)")),
        ({"b_dec": torch.ones(D, dtype=torch.int32)}, BadFile, ("b_dec", "a floating-point tensor")),
        ({"sq_act_running_avg": torch.ones(D)}, BadShape, ("sq_act_running_avg", "shape (16)", "shape (6,)")),
    ],
)
def test_wrong_tensors_are_named(
    tmp_path: Path, suffix: str, changed: Tensors, error: type[EvalkitError], words: tuple[str, ...]
) -> None:
    file = store(tmp_path / f"layers.1{suffix}", tensors(**changed))
    with pytest.raises(error) as caught:
        NabeshimaReader().read(file, model="toy")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_numbers_that_are_not_finite_are_reported_where_they_are_read(tmp_path: Path) -> None:
    values = tensors()
    values["W_enc"][2, 3] = torch.nan
    (source,) = NabeshimaReader().read(store(tmp_path / "layers.1.pt", values), model="toy")
    assert source.activations(torch.ones(1, 2, D), ["4"]).isfinite().all()
    with pytest.raises(BadFile, match=r"layers\.1\.pt: W_enc: expected finite numbers; seen 1 of 6 are NaN"):
        source.activations(torch.ones(1, 2, D), ["3"])


def pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps({AVERAGE: Bomb(file.with_name("ran"))}, protocol=2))


def loaded(file: Path) -> None:
    torch.save(tensors() | {"payload": Bomb(file.with_name("ran"))}, file)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("broken", [cut, pickled, loaded])
def test_torn_and_hostile_files(tmp_path: Path, suffix: str, broken: Callable[[Path], None]) -> None:
    file = store(tmp_path / f"layers.1{suffix}")
    broken(file)
    reader = NabeshimaReader()
    reader.matches(tmp_path)
    with pytest.raises(BadFile, match=r"layers\.1\.\w+: expected plain tensors in .+; seen .+; fix: ") as caught:
        reader.read(file, model="toy")
    assert "\n" not in str(caught.value)
    assert suffix == ".safetensors" or broken is cut or "pickled objects, which could run code" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_what_is_missing(tmp_path: Path) -> None:
    file = store(tmp_path / "mine.pt")
    with pytest.raises(BadConfig, match=r"a card\.json with a site, or the option site=; seen none of these"):
        NabeshimaReader().read(file, model="toy")
    with pytest.raises(BadConfig, match=r"the option model=; seen none of these"):
        NabeshimaReader().read(file, site="layers.1")
    with pytest.raises(BadConfig, match="expected the options l0, model, name, site, subject; seen layer"):
        NabeshimaReader().read(file, layer=3)
    with pytest.raises(BadConfig, match="one dictionary, because the option name= is given; seen 2 dictionaries"):
        NabeshimaReader().read(DATA, model="toy", name="mine")
    with pytest.raises(
        MissingFile,
        match=r"a folder with \.pt or \.safetensors files that hold normalizer\.running_avg.*seen no such file or folder",
    ):
        NabeshimaReader().read(tmp_path / "absent")
