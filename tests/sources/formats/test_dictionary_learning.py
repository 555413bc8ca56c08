"""dictionary_learning's layout: what the library computes with its files, where they read, what broken files give."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evalkit.errors import BadConfig, BadFile, BadShape, EvalkitError, MissingFile
from evalkit.records import Site
from evalkit.registry import create
from evalkit.sources.formats.dictionary_learning import DictionaryLearningReader, read_weights
from evalkit.util.tensor_files import Stored
from tests.support.hostile import Bomb, cut
from tests.support.paths import SOURCES_DATA

DATA = SOURCES_DATA / "dictionary_learning"
D, N = 12, 32  # of the fixtures
MODEL = "pythia-160m-deduped"
CASES = {
    "Standard": "relu",
    "New": "relu",
    "Gated": "gated",
    "JumpRelu": "jumprelu",
    "TopK": "topk",
    "BatchTopK": "jumprelu",
    "BatchTopKUnset": "jumprelu",
    "Matryoshka": "jumprelu",
}


def fixture(case: str, trainer: int = 0) -> Path:
    return DATA / case / "resid_post_layer_8" / f"trainer_{trainer}"


def copied(target: Path, case: str, *, state: dict[str, Any] | None = None, buffer: Any = None, **trainer: Any) -> Path:
    """A fixture elsewhere with other tensors and config; ``None`` takes away."""
    shutil.copytree(fixture(case), target)
    held = json.loads((target / "config.json").read_text())
    held["trainer"] = {key: value for key, value in {**held["trainer"], **trainer}.items() if value is not None}
    held["buffer"] = held["buffer"] if buffer is None else buffer
    (target / "config.json").write_text(json.dumps(held))
    tensors = torch.load(target / "ae.pt", weights_only=True) | (state or {})
    torch.save({name: value for name, value in tensors.items() if value is not None}, target / "ae.pt")
    return target


@pytest.mark.parametrize(
    "folder", sorted(file.parent for file in DATA.rglob("expected.npz")), ids=lambda f: f.parts[-3]
)
def test_activations_and_reconstructions_are_the_librarys(folder: Path) -> None:
    (source,) = DictionaryLearningReader().read(folder)
    expected = np.load(folder / "expected.npz")
    hidden = torch.from_numpy(expected["x"])[None]
    every = source.activations(hidden, source.features())[0].numpy()
    np.testing.assert_allclose(every, expected["activations"], atol=1e-5)
    some = [7, 0, 21]
    picked = source.activations(hidden, [str(each) for each in some])[0].numpy()
    np.testing.assert_allclose(picked, expected["activations"][:, some], atol=1e-5)
    np.testing.assert_allclose(source.reconstruct(hidden)[0].numpy(), expected["reconstruction"], atol=1e-5)
    assert (expected["activations"] > 0).any(axis=1).all()


def test_fixtures_cover_every_class() -> None:
    assert json.loads((DATA / "made_by.json").read_text())["dictionary-learning"] == "0.1.0"
    found = {folder.name: read_weights(fixture(folder.name)) for folder in DATA.iterdir() if folder.is_dir()}
    assert {case: weights.activation for case, weights in found.items()} == CASES
    assert {case for case, weights in found.items() if weights.shift is None} == {"New", "JumpRelu"}
    assert all(isinstance(weights.w_enc, Stored) and isinstance(weights.w_dec, Stored) for weights in found.values())


def test_decoders_keep_their_lengths() -> None:
    stored = torch.load(fixture("Standard") / "ae.pt", weights_only=True)["decoder.weight"]
    found = read_weights(fixture("Standard")).w_dec
    assert isinstance(found, Stored)
    torch.testing.assert_close(found.read(), stored.T)
    assert float((stored.norm(dim=0) - 1).abs().max()) > 0.5


def test_names_sites_and_l0_of_a_suite() -> None:
    sources = [source for case in ("TopK", "BatchTopK") for source in DictionaryLearningReader().read(DATA / case)]
    start = f"{MODEL}/layers.8/sae/width-32"
    assert [source.name for source in sources] == [
        f"{start}/TopK/trainer_0/l0-4",
        f"{start}/TopK/trainer_1/l0-7",
        f"{start}/BatchTopK/trainer_0/l0-4",
    ]
    assert {source.site for source in sources} == {Site(MODEL, "layers.8")}
    assert [source.l0 for source in sources] == [4.0, 7.0, 4.0]
    (unknown,) = DictionaryLearningReader().read(fixture("Gated"))
    assert (unknown.name, unknown.l0, unknown.info.declared) == (f"{start}/GatedSAE/trainer_0", None, {})
    names = [source.name for source in DictionaryLearningReader().read(DATA)]
    assert len(names) == 9


def test_registry_knows_it_and_it_recognises_its_layout(tmp_path: Path) -> None:
    reader = create("sources", "dictionary-learning")
    folder = fixture("TopK")
    assert all(reader.matches(path) for path in (DATA, folder, folder / "ae.pt", folder / "config.json"))
    assert not any(reader.matches(path) for path in (tmp_path, tmp_path / "none", folder / "expected.npz"))
    assert len(reader.read(folder / "ae.pt")) == 1


@pytest.mark.parametrize(
    ("place", "trainer", "buffer", "options", "site"),
    [
        ("t", {}, None, {}, Site(MODEL, "layers.8")),
        ("t", {"submodule_name": "resid_pre_layer_8"}, None, {}, Site(MODEL, "layers.7")),
        ("t", {"submodule_name": "mlp_out_layer_8"}, None, {}, Site(MODEL, "layers.8.mlp")),
        ("t", {"submodule_name": "attn_out_layer8"}, None, {}, Site(MODEL, "layers.8.self_attn")),
        ("t", {"submodule_name": "gpt_neox.layers.8.mlp"}, None, {}, Site(MODEL, "layers.8.mlp")),
        ("t", {"submodule_name": "mlp_layer_8"}, {"io": "in"}, {}, Site(MODEL, "layers.8.mlp:in")),
        ("resid_post_layer_8/trainer_1", {"submodule_name": None}, None, {}, Site(MODEL, "layers.8")),
        ("mlp_out_layer8", {"submodule_name": None}, None, {}, Site(MODEL, "layers.8.mlp")),
        ("t", {"submodule_name": "mine"}, {"io": "in_and_out"}, {"site": "layers.2"}, Site(MODEL, "layers.2")),
        ("t", {"layer": 3}, None, {"site": "layers.3", "model": "m"}, Site("m", "layers.3")),
        ("t", {"lm_name": None}, None, {"subject": "s"}, Site("s", "layers.8")),
        ("t", {}, None, {"subject": "s"}, Site(MODEL, "layers.8")),
    ],
)
def test_sites(
    tmp_path: Path, place: str, trainer: dict[str, Any], buffer: Any, options: dict[str, str], site: Site
) -> None:
    folder = copied(tmp_path / "suite" / place, "Standard", buffer=buffer, **trainer)
    (source,) = DictionaryLearningReader().read(folder, **options)
    assert source.site == site


def test_what_others_measured_is_declared(tmp_path: Path) -> None:
    folder = copied(tmp_path / "trainer_3", "JumpRelu")
    (folder / "eval_results.json").write_text(json.dumps({"l0": 61.25, "frac_variance_explained": 0.75, "cossim": 0.9}))
    (source,) = DictionaryLearningReader().read(folder)
    assert (source.l0, source.info.declared) == (61.25, {"l0": 61.25, "frac_variance_explained": 0.75})
    assert source.name == f"{MODEL}/layers.8/sae/width-32/JumpRelu/trainer_3/l0-61.25"
    (folder / "card.json").write_text(json.dumps({"name": "known", "site": "layers.2", "fvu": 0.3}))
    (carded,) = DictionaryLearningReader().read(folder, l0=20)
    assert (carded.name, carded.l0, carded.site.path, carded.info.declared["fvu"]) == ("known", 20.0, "layers.2", 0.3)


def test_k_of_the_weights_where_the_config_has_none_and_of_the_config_where_the_weights_have_none(
    tmp_path: Path,
) -> None:
    (of_weights,) = DictionaryLearningReader().read(copied(tmp_path / "a", "TopK", k=None))
    (of_config,) = DictionaryLearningReader().read(copied(tmp_path / "b", "TopK", state={"k": None}))
    assert (of_weights.weights.k, of_weights.l0) == (of_config.weights.k, of_config.l0) == (4, 4.0)


SQUARE = torch.ones(N, N)


@pytest.mark.parametrize(
    ("case", "state", "trainer", "error", "words"),
    [
        ("Standard", {"bias": None}, {}, BadFile, ("ae.pt: bias", "seen only decoder.weight, encoder.bias")),
        ("Standard", {"encoder.weight": SQUARE}, {}, BadShape, ("encoder.weight", "shape (32, 12)", "shape (32, 32)")),
        ("Standard", {"decoder.weight": torch.ones(N, D)}, {}, BadShape, ("decoder.weight", "(12, 32)", "(32, 12)")),
        ("Standard", {"bias": torch.ones(D - 1)}, {}, BadShape, ("bias", "shape (12)", "shape (11,)")),
        ("Standard", {"bias": torch.full((D,), torch.nan)}, {}, BadFile, ("ae.pt: bias", "finite numbers", "12 of 12")),
        ("Standard", {"bias": torch.ones(D, dtype=torch.int64)}, {}, BadFile, ("bias", "a floating-point tensor")),
        ("Standard", {}, {"dict_size": 10**15}, BadShape, ("encoder.weight", f"shape ({10**15}, 12)", "(32, 12)")),
        ("Standard", {}, {"activation_dim": 16}, BadShape, ("encoder.weight", "shape (32, 16)", "config belongs")),
        ("Standard", {}, {"dict_size": -4}, BadConfig, ("trainer.dict_size", "a whole number of at least 1", "-4")),
        ("Standard", {}, {"dict_class": "AutoEncoderNew"}, BadFile, ("decoder.bias", "seen only bias,")),
        ("Standard", {}, {"dict_class": "GatedAutoEncoder"}, BadFile, ("decoder_bias", "seen only bias,")),
        ("Standard", {}, {"dict_class": "JumpReluAutoEncoder"}, BadFile, ("W_enc", "seen only bias,")),
        ("Gated", {}, {"dict_class": "AutoEncoder"}, BadFile, ("encoder.bias", "seen only decoder.weight,")),
        ("Matryoshka", {}, {"dict_class": "BatchTopKSAE"}, BadFile, ("encoder.weight", "seen only W_dec, W_enc")),
        ("Matryoshka", {}, {"dict_class": "JumpReluAutoEncoder"}, BadShape, ("threshold", "shape (32)", "shape (1,)")),
        ("JumpRelu", {}, {"dict_class": "MatryoshkaBatchTopKSAE", "k": 4}, BadShape, ("threshold", "(1)", "(32,)")),
        ("Matryoshka", {"threshold": None}, {}, BadFile, ("ae.pt: threshold", "seen only W_dec")),
        ("Matryoshka", {"W_dec": torch.ones(D, N)}, {}, BadShape, ("W_dec", "shape (32, 12)", "shape (12, 32)")),
        ("Standard", {}, {"dict_class": "IdentityDict"}, BadConfig, ("trainer.dict_class", "which has no latents")),
        ("Standard", {}, {"dict_class": "Mine"}, BadConfig, ("one of AutoEncoder, AutoEncoderNew,", "'Mine'")),
        ("Standard", {}, {"dict_class": ["AutoEncoder"]}, BadConfig, ("trainer.dict_class", "['AutoEncoder']")),
        ("TopK", {}, {"k": 5}, BadConfig, ("config.json: trainer.k", "1 to 32, the width, and 4 as ae.pt has it", "5")),
        ("TopK", {"k": None}, {"k": 33}, BadConfig, ("trainer.k", "1 to 32, the width; seen 33")),
        ("TopK", {"k": None}, {"k": None}, BadConfig, ("trainer.k", "seen none")),
        ("BatchTopK", {}, {"k": 2.5}, BadConfig, ("trainer.k", "a whole number of at least 1", "2.5")),
        ("Standard", {}, {"layer": 3}, BadConfig, ("trainer.layer", "8, as in resid_post_layer_8", "3")),
        ("Standard", {}, {"submodule_name": "mine"}, BadConfig, ("the hook 'mine'", "--site layers.12")),
        ("Standard", {}, {"lm_name": None}, BadConfig, ("the model it was trained on", "model=gemma-2-2b")),
    ],
)
def test_wrong_tensors_and_configs_are_named(
    tmp_path: Path,
    case: str,
    state: dict[str, Any],
    trainer: dict[str, Any],
    error: type[EvalkitError],
    words: tuple[str, ...],
) -> None:
    folder = copied(tmp_path / "t", case, state=state, **trainer)
    with pytest.raises(error) as caught:
        DictionaryLearningReader().read(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_numbers_that_are_not_finite_are_reported_where_they_are_read(tmp_path: Path) -> None:
    weight = torch.ones(N, D)
    weight[3, 2] = torch.nan
    (source,) = DictionaryLearningReader().read(copied(tmp_path / "t", "Standard", state={"encoder.weight": weight}))
    hidden = torch.ones(1, 2, D)
    assert source.activations(hidden, ["4", "5"]).isfinite().all()
    with pytest.raises(BadFile, match=r"ae\.pt: encoder\.weight: expected finite numbers; seen 1 of 24 are NaN"):
        source.activations(hidden, ["2", "3"])


def pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb(file.with_name("ran")), protocol=2))


def loaded(file: Path) -> None:
    torch.save(torch.load(file, weights_only=True) | {"payload": Bomb(file.with_name("ran"))}, file)


def stretched(file: Path) -> None:
    torch.save({"encoder.weight": torch.ones(1).expand(10**9, D)}, file)


def listed(file: Path) -> None:
    torch.save([torch.ones(3)], file)


@pytest.mark.parametrize(
    ("broken", "seen"),
    [
        (cut, ""),
        (pickled, "pickled objects, which could run code"),
        (loaded, "pickled objects, which could run code"),
        (stretched, "encoder.weight claims shape"),
        (listed, "a list instead of named tensors"),
        (lambda file: file.write_bytes(b""), ""),
    ],
)
def test_torn_and_hostile_files(tmp_path: Path, broken: Callable[[Path], None], seen: str) -> None:
    folder = copied(tmp_path / "t", "Standard")
    broken(folder / "ae.pt")
    with pytest.raises(
        BadFile, match=r"ae\.pt: expected plain tensors in a file that torch wrote; seen .+; fix: "
    ) as caught:
        DictionaryLearningReader().read(folder)
    assert f"seen {seen}" in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "ran").exists()


def test_configs_that_cannot_be_read(tmp_path: Path) -> None:
    folder = copied(tmp_path / "t", "Standard", buffer={"io": "in_and_out"})
    with pytest.raises(BadConfig, match=r"config\.json: buffer\.io: expected in or out; seen 'in_and_out'"):
        DictionaryLearningReader().read(folder)
    with pytest.raises(BadConfig, match="expected the options l0, model, name, site, subject; seen layer"):
        DictionaryLearningReader().read(folder, layer=3)
    (folder / "config.json").write_text("{}")
    with pytest.raises(BadFile, match=r"config\.json: trainer: expected a JSON object with dict_class"):
        DictionaryLearningReader().read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BadFile, match=r"config\.json: expected a JSON object"):
        DictionaryLearningReader().read(folder)
    with pytest.raises(MissingFile, match=r"a folder with ae\.pt and config\.json.*seen no such file or folder"):
        DictionaryLearningReader().read(tmp_path / "absent")
    with pytest.raises(BadConfig, match="one dictionary, because the option l0= is given; seen 2 dictionaries"):
        DictionaryLearningReader().read(DATA / "TopK", l0=3)
