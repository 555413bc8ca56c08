"""Gemma Scope's layout: the real one in float32, what a hostile or broken file gives, the dictionaries that are shipped."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from evalkit.errors import BadConfig, BadFile, BadShape, EvalkitError, MissingFile
from evalkit.records import Site
from evalkit.registry import create
from evalkit.sources import open_dictionary
from evalkit.sources.formats.gemma_scope import GemmaScopeReader, read_weights
from evalkit.util.tensor_files import Stored, whole
from tests.support import paths
from tests.support.hardware import quick_dtype
from tests.support.hostile import Bomb

D, N = 8, 1024
Arrays = dict[str, np.ndarray]


def arrays(seed: int = 0, n: int = N) -> Arrays:
    rng = np.random.default_rng(seed)
    values = {"W_enc": rng.normal(size=(D, n)), "b_enc": rng.normal(size=n), "W_dec": rng.normal(size=(n, D))}
    values |= {"b_dec": rng.normal(size=D), "threshold": rng.uniform(0, 2, size=n)}
    return {name: value.astype(np.float32) for name, value in values.items()}


def store(folder: Path, values: Arrays) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **values)
    return folder / "params.npz"


def repository(root: Path) -> Path:
    """The folders of google/gemma-scope-2b-pt-res, one layer."""
    base = root / "gemma-scope-2b-pt-res" / "layer_12"
    for width, n in (("1k", 1024), ("2k", 2048)):
        for l0 in (9, 82):
            store(base / f"width_{width}" / f"average_l0_{l0}", arrays(n + l0, n))
    return base


def test_real_layout_round_trips_bit_for_bit(tmp_path: Path) -> None:
    sources = GemmaScopeReader().read(repository(tmp_path))
    assert [source.name for source in sources] == [
        "gemma-2-2b/layers.12/sae/width-1024/l0-9",
        "gemma-2-2b/layers.12/sae/width-1024/l0-82",
        "gemma-2-2b/layers.12/sae/width-2048/l0-9",
        "gemma-2-2b/layers.12/sae/width-2048/l0-82",
    ]
    assert sources[0].site == Site("gemma-2-2b", "layers.12")
    for source, (n, l0) in zip(sources, [(1024, 9), (1024, 82), (2048, 9), (2048, 82)], strict=True):
        expected = arrays(n + l0, n)
        weights = source.weights
        pairs = {"W_enc": weights.w_enc, "b_enc": weights.b_enc, "W_dec": weights.w_dec, "b_dec": weights.b_dec}
        for name, tensor in {**pairs, "threshold": weights.threshold}.items():
            np.testing.assert_array_equal(whole(tensor).numpy(), expected[name])


def test_registry_knows_it_and_it_recognises_its_layout(tmp_path: Path) -> None:
    reader = create("sources", "gemma-scope")
    layer = repository(tmp_path)
    one = layer / "width_1k" / "average_l0_9"
    assert all(reader.matches(path) for path in (layer, one, one / "params.npz", layer.parent))
    assert not any(reader.matches(path) for path in (tmp_path / "none", Path(__file__), Path(__file__).parent))
    assert len(reader.read(one)) == len(reader.read(one / "params.npz")) == 1


def test_site_model_and_l0_from_card_and_options(tmp_path: Path) -> None:
    file = store(tmp_path / "mine", arrays())
    with pytest.raises(BadConfig, match=r"site=layers\.12"):
        GemmaScopeReader().read(file)
    (given,) = GemmaScopeReader().read(file, site="layers.4", model="toy", l0=20, name="mine")
    assert (given.site, given.l0, given.name) == (Site("toy", "layers.4"), 20.0, "mine")
    card = {"model": "toy", "site": "layers.5", "l0": 31.7, "fvu": 0.2, "alive_share": 1.0}
    (file.parent / "card.json").write_text(json.dumps(card))
    (carded,) = GemmaScopeReader().read(file)
    assert carded.name == "toy/layers.5/sae/width-1024/l0-32"
    assert carded.info.declared == {"fvu": 0.2, "l0": 31.7, "alive_share": 1.0}
    with pytest.raises(BadConfig, match=r"the options l0, model, name, out, site, subject; seen layer"):
        GemmaScopeReader().read(file, layer=3)


def literal(values: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z = x W + b; z where it is over both θ and 0; f W_dec + b_dec. In float64."""
    held = {name: value.astype(np.float64) for name, value in values.items()}
    pre = x @ held["W_enc"] + held["b_enc"]
    active = np.where((pre > held["threshold"]) & (pre > 0), pre, 0.0)
    return active, active @ held["W_dec"] + held["b_dec"]


@pytest.mark.parametrize(
    ("repository", "below", "model", "site", "out", "transform"),
    [
        ("gemma-scope-2b-pt-res", "layer_12", "gemma-2-2b", "layers.12", None, "none"),
        ("gemma-scope-9b-it-res", "layer_20", "gemma-2-9b-it", "layers.20", None, "none"),
        ("gemma-scope-2b-pt-att", "layer_3", "gemma-2-2b", "layers.3.self_attn.o_proj:in", None, "none"),
        ("gemma-scope-27b-pt-mlp", "layer_3", "gemma-2-27b", "layers.3.post_feedforward_layernorm", None, "none"),
        ("gemma-scope-2b-pt-res", "embedding", "gemma-2-2b", "embed", None, "none"),
        (
            "models--google--gemma-scope-2b-pt-transcoders/snapshots/abc",
            "layer_7",
            "gemma-2-2b",
            "layers.7.pre_mlp_norm:in",
            "layers.7.post_feedforward_layernorm",
            "RMS norm",
        ),
    ],
)
def test_each_repository_reads_at_its_site(
    tmp_path: Path, repository: str, below: str, model: str, site: str, out: str | None, transform: str
) -> None:
    store(tmp_path / repository / below / "width_1k" / "average_l0_9", arrays())
    (source,) = GemmaScopeReader().read(tmp_path / repository)
    assert (source.site, source.transform()) == (Site(model, site, out), transform)
    assert source.name == f"{model}/{site}/{'transcoder' if out else 'sae'}/width-1024/l0-9"
    raw = np.random.default_rng(1).normal(size=(2, 3, D)) * 4
    x = raw
    if transform == "RMS norm":
        x = raw / np.sqrt((raw**2).mean(-1, keepdims=True) + 1e-6)
    active, rebuilt = literal(arrays(), x)
    assert 0.1 < (active > 0).mean() < 0.9
    hidden = torch.from_numpy(raw.astype(np.float32))
    np.testing.assert_allclose(source.activations(hidden, source.features()).numpy(), active, atol=1e-4)
    np.testing.assert_allclose(source.reconstruct(hidden).numpy(), rebuilt, atol=2e-3)


def test_options_come_before_the_repository(tmp_path: Path) -> None:
    store(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_7" / "width_1k" / "average_l0_9", arrays())
    reader = GemmaScopeReader()
    (source,) = reader.read(tmp_path, site="layers.2.mlp:in", out="layers.2.mlp", model="m")
    assert (source.site, source.transform()) == (Site("m", "layers.2.mlp:in", "layers.2.mlp"), "RMS norm")
    with pytest.raises(BadConfig, match="one SAE, because the option name= or l0= is given; seen 2 SAEs"):
        store(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_8" / "width_1k" / "average_l0_9", arrays())
        reader.read(tmp_path, l0=5)
    store(tmp_path / "gemma-scope-2b-pt-other" / "layer_7" / "width_1k" / "average_l0_9", arrays())
    with pytest.raises(BadConfig, match="seen a repository of kind 'other'"):
        reader.read(tmp_path / "gemma-scope-2b-pt-other")


def test_matrices_stay_on_disk_until_columns_are_asked_for(tmp_path: Path) -> None:
    values = arrays()
    values["W_enc"][3, 17] = np.nan
    store(tmp_path / "layer_1" / "width_1k" / "average_l0_9", values)
    (source,) = GemmaScopeReader().read(tmp_path, model="toy")
    assert isinstance(source.weights.w_enc, Stored)
    assert isinstance(source.weights.w_dec, Stored)
    hidden = torch.ones(1, 2, D)
    assert source.activations(hidden, ["16", "18"]).shape == (1, 2, 2)
    with pytest.raises(BadFile, match=r"W_enc: expected finite numbers; seen 1 of 8 are NaN"):
        source.activations(hidden, ["17"])


def test_folders_further_up_may_be_called_anything(tmp_path: Path) -> None:
    store(tmp_path / "sweep_layer_3" / "layer_3x" / "width_16k" / "layer_12" / "width_1k" / "average_l0_5", arrays())
    (source,) = GemmaScopeReader().read(tmp_path / "sweep_layer_3", model="m")
    assert source.site == Site("m", "layers.12")
    assert source.info.l0 == 5


def test_two_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for part in ("a", "b"):
        store(tmp_path / part / "layer_3" / "width_1k" / "average_l0_9", arrays())
    names = [source.name for source in open_dictionary(tmp_path, model="toy")]
    common = "layer_3/width_1k/average_l0_9"
    assert names == [f"toy/layers.3/sae/width-1024/l0-9@{part}/{common}" for part in ("a", "b")]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFile) as caught:
        GemmaScopeReader().read(tmp_path / "absent")
    assert str(caught.value) == (
        f"{tmp_path / 'absent'}: expected a params.npz, or a folder such as layer_12/width_16k/average_l0_82 with one; "
        "seen no such file or folder; fix: check the path, or download the folder again"
    )
    with pytest.raises(MissingFile, match=r"no params\.npz in this folder"):
        GemmaScopeReader().read(tmp_path)


def changed(name: str, value: np.ndarray) -> Arrays:
    return {**arrays(), name: value}


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({k: v for k, v in arrays().items() if k != "threshold"}, BadFile, ("threshold", "the tensors W_enc")),
        (changed("W_dec", np.zeros((D, N), np.float32)), BadShape, ("W_dec", "(1024, 8)", "(8, 1024)")),
        (changed("b_enc", np.zeros(N - 1, np.float32)), BadShape, ("b_enc", "(1024,)", "(1023,)")),
        (changed("W_enc", np.zeros(N, np.float32)), BadShape, ("W_enc", "a matrix", "(1024,)")),
        (changed("W_enc", np.zeros((0, N), np.float32)), BadShape, ("W_enc", "a matrix")),
        (changed("b_dec", np.full(D, np.nan, np.float32)), BadFile, ("b_dec", "finite", "8 of 8")),
        (changed("b_dec", np.full(D, 1e300)), BadFile, ("b_dec", "finite", "8 of 8")),
        (changed("threshold", np.zeros(N, np.int64)), BadShape, ("threshold", "float16, float32 or float64", "int64")),
        (changed("b_dec", np.array(["x"] * D)), BadShape, ("b_dec", "float16", "<U1")),
    ],
)
def test_wrong_tensors_are_named(
    tmp_path: Path, values: Arrays, error: type[EvalkitError], words: tuple[str, ...]
) -> None:
    file = store(tmp_path, values)
    with pytest.raises(error) as caught:
        read_weights(file)
    assert str(file) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_pickles_do_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    pickled = np.empty(N, dtype=object)
    pickled[0] = Bomb(mark)
    file = store(tmp_path / "objects", changed("b_enc", pickled))
    with pytest.raises(BadFile, match="pickled objects"):
        read_weights(file)
    plain = tmp_path / "plain" / "params.npz"
    plain.parent.mkdir()
    plain.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(BadFile):
        read_weights(plain)
    assert not mark.exists()


def test_torn_files_are_named(tmp_path: Path) -> None:
    whole = store(tmp_path / "whole", arrays()).read_bytes()
    file = tmp_path / "torn" / "params.npz"
    file.parent.mkdir()
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:cut])
        with pytest.raises(BadFile, match=r"an \.npz archive of plain arrays"):
            read_weights(file)
    flipped = bytearray(whole)
    flipped[300:340] = b"\xff" * 40
    file.write_bytes(bytes(flipped))
    with pytest.raises(BadFile):
        read_weights(file)
    np.save(file.with_suffix(".npy"), arrays()["b_enc"])
    file.with_suffix(".npy").rename(file)
    with pytest.raises(BadFile, match="a single array instead of an archive"):
        read_weights(file)


def test_a_folder_that_lies_about_its_width(tmp_path: Path) -> None:
    file = store(tmp_path / "layer_1" / "width_16k" / "average_l0_9", arrays())
    with pytest.raises(BadShape, match="about 16384 latents, as in the folder's name; seen 1024"):
        GemmaScopeReader().read(file, model="toy")


BUNDLED = paths.BUNDLED / "sae"


def test_bundled_dictionaries_open_with_true_cards() -> None:
    sources = GemmaScopeReader().read(BUNDLED)
    assert len(sources) == len({source.name for source in sources}) == 5
    widths = [source.weights.width for source in sources]
    assert sorted(widths) == [1024, 2048, 2048, 2048, 4096]
    two_k = [source.l0 for source in sources if source.weights.width == 2048]
    assert two_k == sorted(two_k) and all(b > 1.5 * a for a, b in pairwise(two_k))
    for source in sources:
        folder = BUNDLED / "layer_15" / f"width_{source.weights.width // 1024}k" / f"average_l0_{source.l0:g}"
        card = json.loads((folder / "card.json").read_text())
        assert (card["name"], card["width"], card["site"]) == (source.name, source.weights.width, "layers.15")
        assert source.site == Site("smollm2-135m", "layers.15")
        assert round(card["l0"]) == source.l0
        assert {"command", "corpus", "n_tokens", "fvu", "alive_share", "seed", "date"} <= card.keys()
        norms = np.linalg.norm(whole(source.weights.w_dec).numpy(), axis=1)
        np.testing.assert_allclose(norms, 1.0, atol=2e-3)
    near = [source.info.declared["l0"] for source in sources if source.l0 == two_k[1]]
    assert len(near) == 3 and max(near) < 1.15 * min(near)


@pytest.mark.slow
def test_bundled_dictionaries_fit_the_demo_corpus_as_their_cards_say(smollm2: Path, tmp_path: Path) -> None:
    """The first 96 full contexts; the card has the first 1,600, so the tolerance is that of the sample."""
    from evalkit.corpus.tokenisation import tokenize_corpus
    from evalkit.subject.model import Subject

    subject = Subject.load(smollm2, sites=("layers.15",), dtype=quick_dtype(), device="cpu")
    corpus = tokenize_corpus("bundled:demo", subject.tokenizer, tmp_path / "contexts", max_tokens=30_000)
    batch = corpus.batch(np.flatnonzero(corpus.lengths == 128)[:96])
    rows = subject.hidden(batch.token_ids)["layers.15"][torch.from_numpy(batch.valid)]
    norms = rows.norm(dim=1)
    x = rows[norms <= 10 * norms.median()].double().numpy()
    total = ((x - x.mean(0)) ** 2).sum()
    for source in GemmaScopeReader().read(BUNDLED):
        info, weights = source.bind(subject.info).info, source.weights
        pre = x @ whole(weights.w_enc).double().numpy() + weights.b_enc.double().numpy()
        active = np.where(pre > np.maximum(weights.threshold.double().numpy(), 0), pre, 0.0)
        error = x - active @ whole(weights.w_dec).double().numpy() - weights.b_dec.double().numpy()
        card = json.loads(
            next(BUNDLED.glob(f"layer_15/width_{info.width // 1024}k/average_l0_{info.l0:g}/card.json")).read_text()
        )
        assert (error**2).sum() / total == pytest.approx(card["demo"]["fvu"], rel=0.08)
        assert (active > 0).sum(1).mean() == pytest.approx(card["demo"]["l0"], rel=0.08)
