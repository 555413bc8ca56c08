"""``evalkit run`` and ``evalkit inspect`` on a folder of every format, from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from evalkit import read_run
from evalkit.cli import main
from evalkit.sources import open_dictionary
from tests.conftest import _TOKENS, _tiny
from tests.support.dictionaries import write_rqae, write_sae
from tests.support.gemma_scope_2 import write_gemma_scope_2
from tests.support.paths import SOURCES_DATA
from tests.support.run_folders import WORDS

DATA = SOURCES_DATA
MADE = ["gemma-scope", "gemma-scope-2", "rqae", "directions"]
STORED = [
    *(f"saelens/{name}" for name in ("standard", "gated", "topk", "jumprelu_constant_norm", "hook_z", "batchtopk")),
    *(f"sparsify/{name}" for name in ("topk", "groupmax", "transcoder")),
    *(f"dictionary_learning/{name}" for name in ("BatchTopK", "Gated", "JumpRelu", "Matryoshka", "New", "Standard")),
    "dictionary_learning/TopK/resid_post_layer_8/trainer_0",
    "nabeshima/layers.3.safetensors",
]
pytestmark = pytest.mark.slow


def made(kind: str, folder: Path) -> Path:
    """A dictionary in a layout that this project writes itself."""
    if kind == "gemma-scope":
        return write_sae(folder, 24, 48, 9)
    if kind == "gemma-scope-2":
        return write_gemma_scope_2(folder / "resid_post" / "layer_3_width_64_l0_small")
    if kind == "rqae":
        return write_rqae(folder / "rqae", 24, 8, model="tiny", site="layers.3")
    save_file(
        {"vectors": np.random.default_rng(0).normal(size=(6, 24)).astype(np.float32)}, folder / "vectors.safetensors"
    )
    return folder / "vectors.safetensors"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(chance.choice(WORDS, 100))}) for _ in range(50)))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of random Llamas of 14 blocks by width, made when they are first asked for."""
    from transformers import LlamaConfig

    class ByWidth(dict[int, Path]):
        def __missing__(self, width: int) -> Path:
            config = LlamaConfig(
                vocab_size=300, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=14, num_attention_heads=2,
                num_key_value_heads=2, head_dim=width // 2, max_position_embeddings=256, **_TOKENS,
            )  # fmt: skip
            self[width] = _tiny(config, tmp_path_factory.mktemp(f"width-{width}") / "tiny")
            return self[width]

    return ByWidth()


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *command: object) -> str:
    monkeypatch.setattr(sys, "argv", ["evalkit", "-q", *map(str, command)])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert not stopped.value.code, err
    return out


@pytest.mark.parametrize("which", [*MADE, *STORED])
def test_a_folder_of_the_format_is_scored_and_inspected(
    which: str,
    corpus: Path,
    models: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = made(which, tmp_path) if which in MADE else DATA / which
    options = {"site": "layers.3"} if which in ("directions", "nabeshima/layers.3.safetensors") else {}
    (source, *_) = open_dictionary(path, subject="tiny", depths=(4,), **options)
    if source.info.kind == "rqae":
        width = source.encoder.model.config.dim  # type: ignore[attr-defined]
    else:
        width = source.vectors.shape[1] if source.info.kind == "directions" else source.weights.d_model  # type: ignore[attr-defined]
    site = [] if not options and source.site.path.split(".")[1] != "25" else ["--site", "layers.3"]
    common = ["--model", models[width], "--corpus", corpus, "--dtype", "float32", *site]
    run = ["run", *common, "-d", path, "--depths", "4", "--out", tmp_path / "run", "--force", "--controls", "shuffled"]
    features = "2" if source.info.kind == "rqae" else "ids:0,1"
    judge = ["--explainer", "words", "--judge", "embedding", "--scorer", "detection"]
    planned = json.loads(call(monkeypatch, capsys, *run, "--features", features, *judge, "--dry-run", "--json"))
    assert planned["dictionaries"] == [source.name] or source.info.kind == "rqae"
    collect = ["collect", *run[1:], "--features", features, "--positives", 3, "--negatives", 3, "--examples", 4]
    call(monkeypatch, capsys, *collect)
    frames = read_run(tmp_path / "run") if (tmp_path / "run" / "examples").exists() else None
    assert frames is not None and len(frames.features) == 2
    if source.info.kind == "directions":
        looked = json.loads(call(monkeypatch, capsys, "inspect", path, *common, "--out", tmp_path / "look", "--json"))
        assert looked["kind"] == "directions" and len(looked["parts"]["geometry"]) >= 2
    else:
        measured = json.loads((tmp_path / "run" / "fit.json").read_text())
        assert np.isfinite(measured[source.name]["fvu_measured"])
        shown = ["--only", "fit", "--fit-tokens", 800, "--out", tmp_path / "look", "--json"]
        depth = ["--depths", "8"] if source.info.kind == "rqae" else []
        about = json.loads(call(monkeypatch, capsys, "inspect", path, *common, *shown, *depth))
        about = about.get("about", about)
        assert {"name", "format", "kind", "width", "site", "l0", "fvu"} <= about.keys() and np.isfinite(about["fvu"])
