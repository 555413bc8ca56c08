from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from evalkit.collect.activations import SHARD_CONTEXTS, Collection, SelectedFeatures, collect
from evalkit.collect.calibration import calibrate, choose_centres, top_share_threshold
from evalkit.errors import BadFile, CorpusError
from evalkit.sources.controls import PlantedSource, RandomDirectionsSource
from evalkit.util.sealed_files import is_sealed, seal
from tests.support.array_corpus import ArrayCorpus, random_corpus
from tests.support.table_states import D_MODEL, SITE, TableStates, pools_of


def sources() -> list[SelectedFeatures]:
    random = RandomDirectionsSource(SITE, D_MODEL, 6, 0.01, seed=0)
    random = random.with_thresholds({str(i): 2.0 for i in range(6)})
    planted = PlantedSource(SITE, {"a": tuple(range(20)), "b": (1000, 2000)})
    return [SelectedFeatures(random, ("5", "0", "3")), SelectedFeatures(planted, ("a", "b"))]


@pytest.fixture(scope="module")
def corpus() -> ArrayCorpus:
    return random_corpus(n=150)


def test_entries_equal_the_dense_definition(corpus: ArrayCorpus, tmp_path: Path) -> None:
    collection = collect(corpus, TableStates(), sources(), tmp_path, batch_size=8)
    found = collection.read(0)
    everything = corpus.batch(np.arange(150))
    hidden = TableStates().table()[torch.from_numpy(everything.token_ids)]
    dense = (hidden @ sources()[0].source.directions(["5", "0", "3"]).T).reshape(-1, 3).numpy()  # type: ignore[attr-defined]
    wanted = np.argwhere((dense > 2.0) & everything.valid.reshape(-1, 1))
    assert sorted(zip(found.tokens.tolist(), found.features.tolist(), strict=True)) == sorted(
        map(tuple, wanted.tolist())
    )
    assert np.allclose(found.values, dense[found.tokens, found.features] - 2.0, atol=1e-5)
    assert found.n_tokens == everything.valid.sum()
    planted = collection.read(1)
    hits = np.isin(corpus.tokens, range(20)) & everything.valid
    assert np.array_equal(np.sort(planted.tokens[planted.features == 0]), np.flatnonzero(hits))


def test_attention_sinks_are_masked(corpus: ArrayCorpus, tmp_path: Path) -> None:
    """Half of the tokens are longer than this limit: they neither fire nor count."""
    states = TableStates(limits={SITE.path: float(TableStates().table().norm(dim=-1).median())})
    found = collect(corpus, states, sources(), tmp_path, batch_size=8).read(0)
    everything = corpus.batch(np.arange(150))
    norms = TableStates().table()[torch.from_numpy(everything.token_ids)].norm(dim=-1).numpy()
    sound = everything.valid & (norms <= states.limits[SITE.path])
    assert found.n_tokens == sound.sum()
    assert sound.ravel()[found.tokens].all()
    whole = collect(corpus, TableStates(), sources(), tmp_path / "whole", batch_size=8).read(0)
    assert len(found.tokens) == sound.ravel()[whole.tokens].sum()


def test_sinks_are_ten_times_the_median(corpus: ArrayCorpus, tmp_path: Path) -> None:
    calibration = calibrate(
        corpus, TableStates(), tmp_path / "c.safetensors", sites=[SITE.path], n_contexts=150, centres=[], seed=0
    )
    batch = corpus.batch(np.arange(150))
    norms = TableStates().table()[torch.from_numpy(batch.token_ids)][torch.from_numpy(batch.valid)].norm(dim=-1)
    assert calibration.limits == {SITE.path: pytest.approx(10 * float(norms.median()))}


def test_batch_size_changes_no_byte(corpus: ArrayCorpus, tmp_path: Path) -> None:
    contents = []
    for size in (1, 7, 64, 1000):
        collection = collect(corpus, TableStates(), sources(), tmp_path / str(size), batch_size=size)
        parts = [collection.read(index) for index in range(2)]
        contents.append([(p.tokens.tobytes(), p.features.tobytes(), p.n_tokens) for p in parts])
    assert all(content == contents[0] for content in contents)


def test_shards_on_disk_are_never_computed_again(corpus: ArrayCorpus, tmp_path: Path) -> None:
    collection = collect(corpus, TableStates(), sources(), tmp_path, batch_size=16)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == -(-150 // SHARD_CONTEXTS)
    states = TableStates()
    collect(corpus, states, sources(), tmp_path, batch_size=16)
    assert states.seen == []
    collection.path(1).unlink()
    collect(corpus, states, sources(), tmp_path, batch_size=5)
    assert states.seen == list(range(64, 128))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_shard_is_named(corpus: ArrayCorpus, tmp_path: Path) -> None:
    collection = collect(corpus, TableStates(), sources(), tmp_path, batch_size=16)
    collection.path(0).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(BadFile, match=r"shard-000000\.npz: expected a shard of this run"):
        collection.read(0)


def test_calibration_remembers_and_asks_only_for_the_rest(corpus: ArrayCorpus, tmp_path: Path) -> None:
    centres = choose_centres(corpus, pools_of(corpus, 0), 12, 0)
    path = tmp_path / "calibration.safetensors"
    options = {"sites": [SITE.path], "n_contexts": 20, "centres": centres, "seed": 0}
    first = calibrate(corpus, TableStates(), path, **options)  # type: ignore[arg-type]

    class Refuses:
        def hidden(self, token_ids: np.ndarray) -> dict[str, torch.Tensor]:
            raise AssertionError("the subject model was asked again")

    again = calibrate(corpus, Refuses(), path, **options)  # type: ignore[arg-type]
    assert again.sample.sum() == 20
    everything = corpus.batch(np.arange(150))
    truth = TableStates().table()[torch.from_numpy(everything.token_ids)]
    known = corpus.batch(again.rows)
    assert torch.equal(again.hidden(known)[SITE.path], truth[again.rows])
    assert torch.equal(first.hidden(everything)[SITE.path], truth)
    states = again.centre_states(SITE.path, centres)
    for row, centre in zip(states, centres, strict=True):
        token = int(centre.feature.split("@")[0])
        assert corpus.tokens[centre.context, centre.position] == token
        assert torch.equal(row, TableStates().table()[token])
    with pytest.raises(BadFile, match="expected the calibration states of this run; seen other contexts"):
        calibrate(corpus, Refuses(), path, **{**options, "seed": 1})  # type: ignore[arg-type]


def test_centres_are_uniform_over_unique_tokens() -> None:
    """A token that makes up most of the corpus is drawn no more often than a rare one."""
    tokens = np.full((300, 64), 7)
    tokens[:, 5:45] = np.arange(40) + 100
    tokens[:, 0] = np.arange(300) + 1000  # masked, but tells the documents apart
    corpus = ArrayCorpus(tokens, per_document=1)
    drawn = [
        int(centre.feature.split("@")[0])
        for seed in range(200)
        for centre in choose_centres(corpus, pools_of(corpus, seed), 4, seed)
    ]
    counts = np.bincount(drawn, minlength=140)
    assert 5 <= counts[7] <= 40  # expected 200 · 4/41 ≈ 19.5
    with pytest.raises(CorpusError, match="at least 42 different tokens in the explain pool; seen 41"):
        choose_centres(corpus, pools_of(corpus, 0), 42, 0)


def test_centres_lie_in_the_explain_pool_on_valid_positions(corpus: ArrayCorpus) -> None:
    pools = pools_of(corpus, 5)
    for centre in choose_centres(corpus, pools_of(corpus, 5), 50, 5):
        assert pools[centre.context] == 0
        assert centre.position >= 1


def test_threshold_is_exceeded_by_the_given_share() -> None:
    values = torch.randn(10_000, 3, generator=torch.Generator().manual_seed(0))
    thresholds = top_share_threshold(values, [0.01, 0.1, 0.5])
    shares = [(values[:, column] > thresholds[column]).float().mean().item() for column in range(3)]
    assert shares == pytest.approx([0.01, 0.1, 0.5], abs=1e-6)


def little(folder: Path) -> tuple[Collection, dict[str, np.ndarray]]:
    collection = Collection(folder, n_contexts=10, context_length=8)
    arrays = {
        "n_tokens": np.array([70]),
        "0.token": np.arange(9, dtype=np.uint16),
        "0.feature": np.arange(9, dtype=np.uint32) % 4,
        "0.value": np.linspace(0.5, 3.5, 9, dtype=np.float32),
    }
    collection.write(0, arrays)
    return collection, arrays


@pytest.mark.parametrize("checksums", ["inside", "beside"])
def test_no_damaged_byte_of_a_shard_gives_other_activations(tmp_path: Path, checksums: str) -> None:
    """Every byte of a shard, with its checksums inside, and beside it as those of a run that was carried over have them."""
    collection, arrays = little(tmp_path)
    path = collection.path(0)
    if checksums == "beside":
        np.savez(path, **arrays)
        assert not is_sealed(path)
        seal(path)
    assert is_sealed(path)
    data = path.read_bytes()
    random = np.random.default_rng(0)
    noticed = 0
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            found = collection.read(0)
        except BadFile as error:
            noticed += 1
            assert str(path) in str(error) and "delete the file and run again" in str(error)
        else:
            assert found.n_tokens == 70 and np.array_equal(found.values, arrays["0.value"])
    assert noticed >= 0.97 * len(data)  # spaces of the checksums may become other spaces


@pytest.mark.parametrize("length", range(0, 900, 50))
def test_a_cut_off_shard_is_noticed(tmp_path: Path, length: int) -> None:
    collection, _ = little(tmp_path)
    data = collection.path(0).read_bytes()
    assert len(data) > 900
    collection.path(0).write_bytes(data[:length])
    with pytest.raises(BadFile, match=r"shard-000000\.npz: expected a shard of this run"):
        collection.read(0)


def test_other_tools_read_a_shard_with_checksums(tmp_path: Path) -> None:
    collection, arrays = little(tmp_path)
    with zipfile.ZipFile(collection.path(0)) as archive:
        assert archive.testzip() is None
        assert set(json.loads(archive.comment)) == {"bytes", "blocks", "own"}
    with np.load(collection.path(0)) as found:
        assert {name: found[name].tolist() for name in found} == {name: one.tolist() for name, one in arrays.items()}
