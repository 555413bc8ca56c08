"""sparsify's layout: what the library itself computes with its files, where they read, what broken files give."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evalkit.errors import BadConfig, BadFile, BadShape, EvalkitError, MissingFile
from evalkit.records import Site
from evalkit.registry import create
from evalkit.sources.formats.sparsify import SparsifyReader, read_weights
from evalkit.util.tensor_files import Stored
from tests.support.hostile import Bomb
from tests.support.paths import SOURCES_DATA

DATA = SOURCES_DATA / "sparsify"
D, N, K = 6, 16, 3
CONFIG = {"activation": "topk", "expansion_factor": 32, "num_latents": N, "k": K, "skip_connection": False}
CONFIG |= {"transcode": False, "d_in": D}
RUN = {"sae": {"k": K}, "model": "EleutherAI/pythia-70m"}
Tensors = dict[str, torch.Tensor]


def tensors(seed: int = 0, **changed: torch.Tensor | None) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)}
    found: dict[str, torch.Tensor | None] = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    found |= {name.replace("__", "."): value for name, value in changed.items()}
    return {name: value for name, value in found.items() if value is not None}


def store(folder: Path, values: Tensors | None = None, **config: Any) -> Path:
    """The folder of one hook point; ``None`` in ``config`` takes a key away."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors() if values is None else values, folder / "sae.safetensors")
    held = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(held))
    return folder


CASES = sorted(str(file.parent.relative_to(DATA)) for file in DATA.rglob("expected.npz"))


@pytest.mark.parametrize("case", CASES)
def test_activations_and_reconstructions_are_the_librarys(case: str) -> None:
    (source,) = SparsifyReader().read(DATA / case)
    expected = np.load(DATA / case / "expected.npz")
    hidden = torch.from_numpy(expected["x"])[None]
    every = source.activations(hidden, source.features())[0].numpy()
    np.testing.assert_allclose(every, expected["activations"], atol=1e-5)
    some = [7, 0, 21]
    np.testing.assert_array_equal(source.activations(hidden, [str(each) for each in some])[0].numpy(), every[:, some])
    np.testing.assert_allclose(source.reconstruct(hidden)[0].numpy(), expected["reconstruction"], atol=1e-5)
    assert (expected["activations"] > 0).any(axis=1).all()


def test_fixtures_cover_both_activations_transcoders_and_skips() -> None:
    assert json.loads((DATA / "made_by.json").read_text())["eai-sparsify"] == "1.3.3"
    weights = {case: read_weights(DATA / case) for case in CASES}
    assert {each.activation for each in weights.values()} == {"topk", "groupmax"}
    assert weights["transcoder/layers.5.mlp"].shift is None and weights["topk/layers.3"].shift is not None
    assert [case for case in CASES if weights[case].w_skip is not None] == ["skip/layers.5.mlp"]


def test_sites_models_and_names_of_a_run() -> None:
    found = {
        root: [(source.name, source.site) for source in SparsifyReader().read(DATA / root)]
        for root in ("topk", "groupmax", "half", "seeds", "transcoder")
    }
    model = "SmolLM2-135M"
    assert found == {
        "topk": [(f"{model}/layers.3/sae/width-48/l0-4", Site(model, "layers.3"))],
        "groupmax": [(f"{model}/layers.1.self_attn/sae/width-32/l0-8", Site(model, "layers.1.self_attn"))],
        "half": [(f"{model}/embed/sae/width-32/l0-5", Site(model, "embed"))],
        "seeds": [
            (f"{model}/layers.0/sae/width-32/l0-2/{variant}", Site(model, "layers.0"))
            for variant in ("best/seed1", "seed0", "seed1")
        ],
        "transcoder": [
            (
                f"{model}/layers.5.mlp:in/transcoder/width-32/l0-3",
                Site(model, "layers.5.mlp:in", "layers.5.mlp"),
            )
        ],
    }


def test_registry_knows_it_and_it_recognises_its_layout(tmp_path: Path) -> None:
    reader = create("sources", "sparsify")
    folder = store(tmp_path / "run" / "layers.2")
    assert all(reader.matches(path) for path in (tmp_path, folder, folder / "cfg.json", folder / "sae.safetensors"))
    (folder / "other.txt").write_text("")
    assert not any(
        reader.matches(path) for path in (tmp_path / "none", folder / "other.txt", Path(__file__).parent / "x")
    )
    assert len(reader.read(folder / "sae.safetensors", model="m")) == 1


def test_one_source_for_each_hook_point_and_nothing_read_before_it_is_asked_for(tmp_path: Path) -> None:
    for place in ("layers.0", "layers.1", "layers.1.mlp"):
        store(tmp_path / place)
    sources = SparsifyReader().read(tmp_path, subject="toy")
    assert [source.site for source in sources] == [
        Site("toy", each) for each in ("layers.0", "layers.1", "layers.1.mlp")
    ]
    assert all(
        isinstance(source.weights.w_enc, Stored) and isinstance(source.weights.w_dec, Stored) for source in sources
    )
    assert [source.l0 for source in sources] == [3.0] * 3
    with pytest.raises(BadConfig, match="one dictionary, because the option name= is given; seen 3 dictionaries"):
        SparsifyReader().read(tmp_path, subject="toy", name="mine")
    (named,) = SparsifyReader().read(tmp_path / "layers.1", subject="toy", name="mine")
    assert named.name == "mine"


@pytest.mark.parametrize(
    ("place", "config", "run", "options", "site"),
    [
        ("layers.1", {}, {}, {"model": "m"}, Site("m", "layers.1")),
        ("model.layers.1.self_attn", {}, {}, {"model": "m"}, Site("m", "layers.1.self_attn")),
        ("transformer.h.1", {}, {}, {"model": "m", "subject": "s"}, Site("m", "layers.1")),
        ("layers.1", {}, RUN, {"subject": "s"}, Site("pythia-70m", "layers.1")),
        ("layers.1", {}, RUN, {"site": "layers.4", "model": "m"}, Site("m", "layers.4")),
        ("layers.1", {}, {"model": "gpt2"}, {"subject": "s"}, Site("s", "layers.1")),
        ("h.1.mlp", {"transcode": True}, RUN, {}, Site("pythia-70m", "layers.1.mlp:in", "layers.1.mlp")),
        (
            "h.1.mlp",
            {"transcode": None},
            {**RUN, "transcode": True},
            {},
            Site("pythia-70m", "layers.1.mlp:in", "layers.1.mlp"),
        ),
        ("h.1.mlp", {"transcode": False}, {**RUN, "transcode": True}, {}, Site("pythia-70m", "layers.1.mlp")),
        ("mine", {"transcode": True}, RUN, {"site": "layers.2"}, Site("pythia-70m", "layers.2:in", "layers.2")),
        ("mine", {}, RUN, {"site": "layers.2.mlp:in"}, Site("pythia-70m", "layers.2.mlp:in", "layers.2.mlp")),
    ],
)
def test_sites(
    tmp_path: Path, place: str, config: dict[str, Any], run: dict[str, Any], options: dict[str, str], site: Site
) -> None:
    folder = store(tmp_path / "checkpoints" / place, **config)
    (folder.parent / "config.json").write_text(json.dumps(run))
    (source,) = SparsifyReader().read(folder, **options)
    assert source.site == site


def test_a_card_names_what_nothing_else_says(tmp_path: Path) -> None:
    folder = store(tmp_path / "mine")
    (folder / "card.json").write_text(json.dumps({"model": "toy", "site": "layers.2", "name": "known", "fvu": 0.25}))
    (source,) = SparsifyReader().read(folder)
    assert (source.site, source.name) == (Site("toy", "layers.2"), "known")
    assert source.info.declared == {"l0": 3, "fvu": 0.25}


def test_early_transcoders_subtract_their_bias_as_they_were_trained(tmp_path: Path) -> None:
    """Published before ``cfg.json`` had ``transcode``; a skip connection says that it is one."""
    values = tensors(W_skip=torch.randn(D, D, generator=torch.Generator().manual_seed(1)))
    folder = store(tmp_path / "layers.5.mlp", values, transcode=None, skip_connection=True, activation=None)
    (source,) = SparsifyReader().read(folder, model="Llama-3.2-1B")
    assert source.site == Site("Llama-3.2-1B", "layers.5.mlp:in", "layers.5.mlp")
    arrays = {name: value.double().numpy() for name, value in values.items()}
    x = np.random.default_rng(2).normal(size=(5, D))
    for token in x:
        pre = np.maximum(arrays["encoder.weight"] @ (token - arrays["b_dec"]) + arrays["encoder.bias"], 0)
        active = np.zeros(N)
        for latent in sorted(range(N), key=lambda each: -pre[each])[:K]:
            active[latent] = pre[latent]
        hidden = torch.from_numpy(token)[None, None]
        np.testing.assert_allclose(source.activations(hidden, source.features())[0, 0].numpy(), active, atol=1e-5)
        output = active @ arrays["W_dec"] + arrays["b_dec"] + arrays["W_skip"] @ token
        np.testing.assert_allclose(source.reconstruct(hidden)[0, 0].numpy(), output, atol=1e-5)


def test_width_from_the_expansion_factor(tmp_path: Path) -> None:
    wide = tensors(encoder__weight=torch.ones(12, D), encoder__bias=torch.ones(12), W_dec=torch.ones(12, D))
    assert read_weights(store(tmp_path / "two", wide, num_latents=0, expansion_factor=2)).width == 12
    assert read_weights(store(tmp_path / "none", wide, num_latents=None, expansion_factor=None)).width == 12
    with pytest.raises(BadShape, match=r"encoder\.weight: expected shape \(18, 6\); seen shape \(12, 6\)"):
        read_weights(store(tmp_path / "three", wide, num_latents=0, expansion_factor=3))


@pytest.mark.parametrize(
    ("values", "config", "error", "words"),
    [
        (tensors(W_dec=None), {}, BadFile, ("sae.safetensors: W_dec", "seen only b_dec, encoder.bias, encoder.weight")),
        (tensors(W_dec=torch.ones(D, N)), {}, BadShape, ("W_dec", "shape (16, 6)", "shape (6, 16)")),
        (tensors(encoder__bias=torch.ones(N - 1)), {}, BadShape, ("encoder.bias", "shape (16)", "shape (15,)")),
        (tensors(b_dec=torch.full((D,), torch.nan)), {}, BadFile, ("b_dec", "finite numbers", "6 of 6")),
        (None, {"num_latents": 10**18}, BadShape, ("encoder.weight", f"shape ({10**18}, 6)", "shape (16, 6)")),
        (None, {"num_latents": -1}, BadConfig, ("cfg.json: num_latents", "a whole number of at least 0", "-1")),
        (None, {"d_in": 7}, BadShape, ("encoder.weight", "shape (16, 7)", "config belongs to these weights")),
        (None, {"d_in": "6"}, BadConfig, ("cfg.json: d_in", "a whole number of at least 1", "'6'")),
        (None, {"k": 17}, BadConfig, ("cfg.json: k", "1 to 16, the width", "17")),
        (None, {"k": None}, BadConfig, ("cfg.json: k", "1 to 16, the width", "none")),
        (None, {"k": True}, BadConfig, ("cfg.json: k", "a whole number", "True")),
        (None, {"activation": "groupmax", "k": 5}, BadConfig, ("cfg.json: k", "a divisor of it", "5")),
        (None, {"activation": "relu"}, BadConfig, ("cfg.json: activation", "topk or groupmax", "'relu'")),
        (None, {"activation": ["topk"]}, BadConfig, ("cfg.json: activation", "topk or groupmax")),
        (None, {"signed": True}, BadConfig, ("cfg.json: signed", "unsigned topk", "signed topk")),
        (None, {"skip_connection": True}, BadFile, ("W_skip", "skip_connection True and no such tensor")),
        (tensors(W_skip=torch.ones(D, D)), {}, BadFile, ("W_skip", "skip_connection False and this tensor")),
    ],
)
def test_wrong_tensors_and_configs_are_named(
    tmp_path: Path, values: Tensors | None, config: dict[str, Any], error: type[EvalkitError], words: tuple[str, ...]
) -> None:
    folder = store(tmp_path / "layers.1", values, **config)
    with pytest.raises(error) as caught:
        SparsifyReader().read(folder, model="toy")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_numbers_that_are_not_finite_are_reported_where_they_are_read(tmp_path: Path) -> None:
    values = tensors()
    values["W_dec"][3, 2] = torch.inf
    (source,) = SparsifyReader().read(store(tmp_path / "layers.1", values), model="toy")
    assert source.activations(torch.ones(1, 2, D), ["3"]).isfinite().all()
    with pytest.raises(BadFile, match=r"sae\.safetensors: W_dec: expected finite numbers; seen 1 of 96"):
        source.reconstruct(torch.ones(1, 2, D))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def lie(file: Path) -> None:
    held = file.read_bytes()
    length = int.from_bytes(held[:8], "little")
    header = held[8 : 8 + length].replace(b"[16,6]", b"[96,6]")
    file.write_bytes(held[:8] + header + held[8 + length :])


def load(file: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb(file.with_name("ran"))))


@pytest.mark.parametrize("broken", [cut, lie, load, lambda file: file.write_bytes(b"")])
def test_torn_and_hostile_files(tmp_path: Path, broken: Callable[[Path], None]) -> None:
    folder = store(tmp_path / "layers.1")
    broken(folder / "sae.safetensors")
    with pytest.raises(
        BadFile, match=r"sae\.safetensors: expected plain tensors in a \.safetensors file; seen .+; fix: "
    ):
        SparsifyReader().read(folder, model="toy")
    assert not (folder / "ran").exists()


def test_configs_that_cannot_be_read_or_say_too_little(tmp_path: Path) -> None:
    folder = store(tmp_path / "layers.1")
    with pytest.raises(BadConfig, match=r"metadata with the model it was trained on, a card\.json with a model"):
        SparsifyReader().read(folder)
    with pytest.raises(BadConfig, match="expected the options l0, model, name, site, subject; seen layer"):
        SparsifyReader().read(folder, layer=3)
    with pytest.raises(BadConfig, match="seen the hook 'mine', which matches no known module"):
        SparsifyReader().read(store(tmp_path / "mine"), model="toy")
    (folder.parent / "config.json").write_text("{")  # of something else: no reason to fail
    assert len(SparsifyReader().read(folder, model="toy")) == 1
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(BadFile, match=r"cfg\.json: expected a JSON object; seen a list"):
        SparsifyReader().read(folder, model="toy")
    with pytest.raises(MissingFile, match=r"a folder with cfg\.json and sae\.safetensors.*seen no such file or folder"):
        SparsifyReader().read(tmp_path / "absent")
