"""The SAE trainer on data whose features are known, its folding into raw units, its checkpoints; cards and folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evalkit.errors import BadConfig, BadFile, CorpusError
from evalkit.records import Site, TokenBatch
from evalkit.sources.formats.gemma_scope import GemmaScopeReader
from evalkit.training.activation_store import ActivationStore
from evalkit.training.cards import Card, CorpusPart, sae_folder, write_sae
from evalkit.training.sae import SaeTrainingConfig, train_sae
from evalkit.util.progress import SILENT
from evalkit.util.tensor_files import whole

D, TRUE, ACTIVE = 40, 48, 3.0
SMALL = SaeTrainingConfig(width=64, l0=ACTIVE, tokens=200_000, batch_size=512, dead_after=20_000, learning_rate=5e-3)


def directions() -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(TRUE, D))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sparse_store(folder: Path, first: int, batches: int, model: str = "toy") -> ActivationStore:
    """Sums of about three of 48 known directions, far from the origin and in large units."""

    def hidden(batch: TokenBatch) -> torch.Tensor:
        rng = np.random.default_rng(int(batch.contexts[0]))
        size = (*batch.token_ids.shape, TRUE)
        weights = (rng.random(size) < ACTIVE / TRUE) * rng.uniform(0.5, 1.5, size)
        return torch.from_numpy((weights @ directions()) * 20 + 50).float()

    corpus = (
        TokenBatch(np.zeros((16, 64), np.int64), np.ones((16, 64), bool), np.arange(16) + 16 * number)
        for number in range(first, first + batches)
    )
    return ActivationStore.build(
        corpus, hidden, Site(model, "layers.3"), folder, corpus_name="sparse", d_model=D, max_tokens=10**6
    )


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, ActivationStore]:
    root = tmp_path_factory.mktemp("stores")
    return sparse_store(root / "train", 0, 40), sparse_store(root / "held-out", 1000, 4)


Stores = tuple[ActivationStore, ActivationStore]


def test_it_finds_the_directions_the_data_is_made_of(stores: Stores) -> None:
    train, held_out = stores
    weights, report = train_sae(train, SMALL, held_out=held_out)
    assert report.fit.fvu < 0.2
    assert report.fit.l0 == pytest.approx(ACTIVE, rel=0.1)
    cosine = weights.w_dec.numpy() @ directions().T
    assert (cosine.max(axis=0) > 0.9).mean() > 0.8
    np.testing.assert_allclose(np.linalg.norm(weights.w_dec.numpy(), axis=1), 1.0, atol=2e-3)
    assert (report.n_tokens, report.n_distinct) == (390 * 512, len(train))


def test_the_report_is_the_textbook_fvu_of_the_raw_hidden_states(stores: Stores) -> None:
    train, held_out = stores
    weights, report = train_sae(train, SMALL, held_out=held_out)
    x = torch.cat(list(held_out.chunks())).numpy().astype(np.float64)
    pre = x @ weights.w_enc.numpy().astype(np.float64) + weights.b_enc.numpy()
    active = np.where((pre > 0) & (pre > weights.threshold.numpy()), pre, 0.0)
    rebuilt = active @ weights.w_dec.numpy() + weights.b_dec.numpy()
    assert report.fit.fvu == pytest.approx(((x - rebuilt) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-3)
    assert report.fit.l0 == pytest.approx((active > 0).sum(1).mean(), rel=1e-3)


class Stop(Exception):
    pass


class StopAt:
    """A progress that interrupts training after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def start(self, description: str, total: int | None, unit: str) -> int:
        return 0

    def advance(self, task: int, amount: int = 1) -> None:
        self.steps -= amount
        if self.steps < 0:
            raise Stop

    def finish(self, task: int) -> None:
        return None


def test_an_interrupted_training_goes_on_to_the_same_weights(stores: Stores, tmp_path: Path) -> None:
    train, held_out = stores
    config = SaeTrainingConfig(width=64, l0=3, tokens=30_720, batch_size=512, dead_after=4_000, checkpoint_steps=20)
    whole, _ = train_sae(train, config, held_out=held_out)
    checkpoint = tmp_path / "sae.checkpoint"
    with pytest.raises(Stop):
        train_sae(train, config, held_out=held_out, checkpoint=checkpoint, progress=StopAt(47))
    assert torch.load(checkpoint, weights_only=True)["step"] == 40
    resumed, _ = train_sae(train, config, held_out=held_out, checkpoint=checkpoint, progress=SILENT)
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    assert checkpoint.exists()  # whoever writes the weights may delete it then


def test_foreign_checkpoints_stores_and_settings_are_refused(stores: Stores, tmp_path: Path) -> None:
    train, held_out = stores
    torn = tmp_path / "torn"
    torn.write_bytes(b"PK not a checkpoint")
    with pytest.raises(BadFile, match="a checkpoint of this training"):
        train_sae(train, SMALL, held_out=held_out, checkpoint=torn)
    with pytest.raises(CorpusError, match=r"states of toy/layers\.3 with d_model \d+; seen other/layers\.3 with"):
        train_sae(train, SMALL, held_out=sparse_store(tmp_path / "other", 0, 1, model="other"))
    with pytest.raises(BadConfig, match="less than the width 64; seen 64"):
        SaeTrainingConfig(width=64, l0=64)
    with pytest.raises(BadConfig, match="batch_size: expected a positive number; seen 0"):
        SaeTrainingConfig(batch_size=0)


def test_what_is_written_is_what_gemma_scope_readers_read(stores: Stores, tmp_path: Path) -> None:
    train, held_out = stores
    config = SaeTrainingConfig(width=64, l0=3, tokens=20_000, batch_size=512)
    weights, report = train_sae(train, config, held_out=held_out)
    card = Card(
        model="toy",
        site="layers.3",
        name=f"toy/layers.3/sae/width-64/l0-{round(report.fit.l0)}",
        kind="sae",
        command="a command",
        corpus=(CorpusPart("sparse", "public domain", 1),),
        n_tokens=report.n_tokens,
        n_distinct_tokens=report.n_distinct,
        held_out_tokens=report.fit.n_tokens,
        fvu=report.fit.fvu,
        l0=report.fit.l0,
        alive_share=report.fit.alive_share,
        width=64,
        seed=0,
        further={"trained_for_l0": 3},
    )
    folder = write_sae(tmp_path, weights, card)
    assert folder == tmp_path / "layer_3" / "width_64" / "average_l0_3"
    first = (folder / "params.npz").read_bytes()
    (source,) = GemmaScopeReader().read(tmp_path)
    assert (source.name, source.info.declared["fvu"]) == (card.name, round(report.fit.fvu, 4))
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold"):
        assert torch.equal(whole(getattr(source.weights, name)), getattr(weights, name))
    stored = json.loads((folder / "card.json").read_text())
    assert stored["trained_for_l0"] == 3
    assert stored["corpus"] == [{"source": "sparse", "licence": "public domain", "documents": 1}]
    write_sae(tmp_path, weights, card)
    assert (folder / "params.npz").read_bytes() == first


def test_folders_are_named_as_gemma_scope_names_them() -> None:
    root = Path("root")
    assert sae_folder(root, Site("m", "layers.15"), 2048, 31.6) == root / "layer_15" / "width_2k" / "average_l0_32"
    assert sae_folder(root, Site("m", "model.layers.2"), 3000, 8.2) == root / "layer_2" / "width_3000" / "average_l0_8"
    assert sae_folder(root, Site("m", "layers.2.mlp"), 1024, 8.0) == root / "layers.2.mlp" / "width_1k" / "average_l0_8"
