"""Sweeps from one file; the published one end to end, on a tiny Gemma 2 and dictionaries of the published widths."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from evalkit.cli import main
from evalkit.config.run_config import RunConfig
from evalkit.config.sweep_file import read_sweep
from evalkit.corpus.tokenisation import tokenize_corpus
from evalkit.errors import BadConfig, MissingFile
from evalkit.records import Site, TokenBatch
from evalkit.subject.final_norm import normalise
from evalkit.subject.model import Subject
from evalkit.training.activation_store import ActivationStore
from evalkit.training.sae import SaeTrainingConfig, train_sae
from rqae import RQAE, RqaeConfig
from rqae.encoding.codebook import grid_codebook
from rqae.progress import SILENT
from rqae.training.initialisation import greedy_layers
from tests.conftest import _HEADS, _SIZE, _TOKENS, _tiny
from tests.support.hardware import quick_dtype

PUBLISHED = Path(__file__).parents[2] / "results" / "sweeps" / "gemma2_2b.toml"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_published_sweep_is_the_published_one() -> None:
    config = read_sweep(PUBLISHED)
    assert (config.model, config.site, config.n_features) == ("google/gemma-2-2b", "layers.12", 100)
    assert config.depths == (16, 64, 256) and config.max_tokens == 4_700_000
    l0s = [re.findall(r"width_(\w+)/average_l0_(\d+)$", str(path)) for path in config.dictionaries[1:]]
    assert [found[0] for found in l0s] == [
        *(("16k", l0) for l0 in ("22", "41", "82", "176", "445")),
        *(("32k", "76"), ("65k", "72"), ("262k", "67"), ("524k", "65")),
    ]


def test_keys_and_changes(tmp_path: Path) -> None:
    head = 'model = "m"\nfeatures = "ids:0-2,9"\nseed = 3\n'
    spec = head + '[[dictionaries]]\npath = "a"\nsite = "layers.2"\n[[dictionaries]]\npath = "b"\n'
    config = read_sweep(write(tmp_path / "s.toml", spec), corpus="other.txt", device=None)
    assert isinstance(config, RunConfig)
    assert (config.feature_ids, config.n_features, config.corpus, config.seed) == (
        ("0", "1", "2", "9"),
        4,
        "other.txt",
        3,
    )
    assert [(one.path, one.site) for one in config.specs()] == [("a", "layers.2"), ("b", None)]
    again = RunConfig.create(**json.loads(json.dumps({k: v for k, v in config.identity().items() if k != "protocol"})))
    assert again.specs() == config.specs()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('modle = "m"', r"s\.toml: modle: expected one of the keys .*; fix: did you mean model\?"),
        ('model = "m"', r"s\.toml: dictionaries: expected a list; seen none"),
        ('model = "m"\ndictionaries = ["d"]\nfeatures = "many"', r"--features: expected 50 .*; seen 'many'"),
        (
            'model = "m"\ndictionaries = ["d"]\nfeatures = 5\nn_features = 6',
            r"features: expected either features, or n_features,",
        ),
        ('model = "m"\ndictionaries = [{path = "d", sites = 3}]', r"dictionaries\.0.*sites|dictionaries\.0"),
        ('model = "m"\ndictionaries = ["d"]\nseed = "x"', r"seed: expected a whole number; seen 'x'"),
        ("model = ", r"expected valid TOML"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        read_sweep(write(tmp_path / "s.toml", text))
    with pytest.raises(MissingFile, match="expected a TOML file"):
        read_sweep(tmp_path / "none.toml")


WORDS = [
    "anchor",
    "boat",
    "captain",
    "deck",
    "east",
    "fog",
    "gale",
    "harbour",
    "island",
    "jetty",
    "keel",
    "lamp",
    "mast",
]
WORDS += ["night", "oar", "port", "quay", "rope", "sail", "tide", "under", "vessel", "whale", "xebec", "yacht", "zone"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a corpus, and a folder tree in the hub's layout with dictionaries that were fitted to this model."""
    from transformers import Gemma2Config

    folder = tmp_path_factory.mktemp("sweep")
    sizes = {**_SIZE, "num_hidden_layers": 14}
    model = _tiny(
        Gemma2Config(**sizes, **_HEADS, **_TOKENS, max_position_embeddings=256, query_pre_attn_scalar=8),
        folder / "model",
    )
    chance = np.random.default_rng(0)
    words = [form(word) for word in WORDS for form in (str.lower, str.title, str.upper)]
    words += [chr(code) for code in range(0x21, 0x41)]  # more tokens than features are asked for
    texts = [" ".join(chance.choice(words, 100)) for _ in range(64)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    subject = Subject.load(model, sites=["layers.12"], dtype=quick_dtype())
    corpus = tokenize_corpus(str(folder / "text.jsonl"), subject.tokenizer, folder / "corpus", context_length=128)

    def states(batch: TokenBatch) -> torch.Tensor:
        return subject.hidden(batch.token_ids)["layers.12"]

    def store(name: str, first: int, last: int) -> ActivationStore:
        batches = (corpus.batch(np.arange(at, min(at + 16, last))) for at in range(first, last, 16))
        return ActivationStore.build(
            batches, states, Site("m", "layers.12"), folder / name, corpus_name="t", d_model=32, max_tokens=10**6
        )

    train, held = store("train", 0, corpus.n_contexts - 40), store("held", corpus.n_contexts - 40, corpus.n_contexts)
    config = SaeTrainingConfig(width=256, l0=8, tokens=400_000, batch_size=512, learning_rate=5e-3, dead_after=50_000)
    weights, report = train_sae(train, config, held_out=held)
    assert report.fit.fvu < 0.5
    root = folder / "hub" / "google" / "gemma-scope-2b-pt-res" / "layer_12"
    for width, l0s in {"16k": (22, 41, 82, 176, 445), "32k": (76,), "65k": (72,), "262k": (67,), "524k": (65,)}.items():
        copies = int(width.removesuffix("k")) // 16 * 2**14 // 256
        for l0 in l0s:  # every latent as often as the width asks for, each with its share of the reconstruction
            place = root / f"width_{width}" / f"average_l0_{l0}"
            place.mkdir(parents=True)
            assert weights.threshold is not None
            np.savez(
                place / "params.npz",
                W_enc=np.tile(weights.w_enc.numpy(), (1, copies)),  # type: ignore[union-attr]
                b_enc=np.tile(weights.b_enc.numpy(), copies),
                W_dec=np.tile(weights.w_dec.numpy() / copies, (copies, 1)),  # type: ignore[union-attr]
                b_dec=weights.b_dec.numpy(),
                threshold=np.tile(weights.threshold.numpy(), copies),
            )
    rows = normalise(torch.cat(list(train.chunks())), subject.info)
    shape = RqaeConfig(32, num_quantizers=256)
    layers = greedy_layers(
        rows, shape, grid_codebook(5, 4, rounded=True).expand(256, -1, -1), torch.Generator().manual_seed(0), SILENT
    )
    RQAE(shape, *(layers[name] for name in ("w_in", "b_in", "w_out", "b_out"))).save_pretrained(
        folder / "hub" / "harish-kamath" / "rqae" / "gemma-2-2b"
    )
    return folder


@pytest.mark.slow
def test_the_published_sweep_runs_from_its_own_file(
    hub: Path, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PUBLISHED.read_text("utf-8")
    text = text.replace("google/gemma-2-2b", str(hub / "model")).replace(
        "HuggingFaceFW/fineweb-edu", str(hub / "text.jsonl")
    )
    spec = write(tmp_path / "sweep.toml", text.replace("features = 100", f'dtype = "{quick_dtype()}"\nfeatures = 50'))
    monkeypatch.setenv("EVALKIT_HUB", str(hub / "hub"))
    monkeypatch.chdir(minilm.parent.parent)  # where models/minilm is found

    def call(*further: str) -> str:
        monkeypatch.setattr(
            sys, "argv", ["evalkit", "-q", "sweep", str(spec), "--out", str(tmp_path / "run"), *further]
        )
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert not stopped.value.code, err
        return out

    planned = json.loads(call("--dry-run", "--json"))
    assert len(planned["dictionaries"]) == len(set(planned["dictionaries"])) == 12
    shown = call()
    table = pd.read_csv(tmp_path / "run" / "table.csv", comment="#")
    scored = table[~table["kind"].str.startswith("null")]
    assert set(scored["dictionary"]) == set(planned["dictionaries"]) and set(scored["n_tried"]) == {50}
    assert (scored[scored["kind"] == "sae"].groupby("dictionary")["n_features"].max() >= 1).all()
    assert "FIT CHECK FAILED" not in shown and "rqae/gemma-2-2b/depth-256" in shown
    names = {path.name for path in (tmp_path / "run" / "plots").iterdir()}
    assert {"scores.png", "scores.svg", "features.png"} <= names
    before = (tmp_path / "run" / "table.csv").read_bytes()
    call()  # everything is there
    assert (tmp_path / "run" / "table.csv").read_bytes() == before
