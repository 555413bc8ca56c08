"""``evalkit train`` from text to a dictionary that ``load_source`` opens, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import evalkit
from evalkit.cli import main


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and held-out documents: words in random order."""
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    words = ["whale", "ship", "sea", "deck", "calm", "night", "storm", "captain", "1851", "(boat)"]
    for name, count in (("train", 60), ("held-out", 10)):
        lines = [
            {"text": " ".join(generator.choice(words, 200)), "source": "made up", "license": "CC0"}
            for _ in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "train.jsonl", folder / "held-out.jsonl"


def train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Path:
    monkeypatch.setattr(sys, "argv", ["evalkit", "-q", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert not stopped.value.code, err
    return Path(out.strip())


def options(model: Path, texts: tuple[Path, Path], work: Path) -> list[object]:
    return ["--model", model, "--site", "layers.3", "--corpus", texts[0], "--held-out", texts[1], "--work", work]


def test_sae(
    tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = train(
        capsys, monkeypatch, "sae", *options(tiny_llama, texts, tmp_path / "work"), "--out", tmp_path / "saes",
        "--width", 64, "--l0", 8, "--train-tokens", 400_000, "--dtype", "float32",
    )  # fmt: skip
    card = json.loads((folder / "card.json").read_text())
    source = evalkit.load_source(folder)
    assert source.info.width == 64 and source.site.path == "layers.3" and source.site.model == "tiny-llama"
    assert 0 < card["fvu"] < 0.6 and 4 < card["l0"] < 16
    assert card["command"].startswith("evalkit -q train sae --model")
    assert card["corpus"] == [{"source": "made up", "licence": "CC0", "documents": 60}]
    assert folder.name == f"average_l0_{round(card['l0'])}"


def test_rqae(
    tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = train(
        capsys, monkeypatch, "rqae", *options(tiny_llama, texts, tmp_path / "work"), "--out", tmp_path / "my-rqae",
        "--quantizers", 16, "--steps", 30, "--dtype", "float32",
    )  # fmt: skip
    card = json.loads((folder / "card.json").read_text())
    assert 0 < card["fvu"] < 0.6
    assert card["fvu_by_depth"]["16"] == card["fvu"]
    assert 0 < card["alive_share"] <= 1
    source = evalkit.load_source(folder, depths=(8,))
    assert source.name == "tiny-llama/layers.3/my-rqae/depth-8"
    assert source.site.path == "layers.3"
    changes = card["loss_change_by_depth"]
    assert set(changes) == set(card["fvu_by_depth"]) == set(card["loss_change_se_by_depth"]) == {"16"}
    assert abs(changes["16"]) < 5 and card["loss_tokens"] > 100
    history = json.loads((folder / "training.json").read_text())
    assert [step for step, _ in history["batches"]] == list(range(1, 31))
    assert history["held_out"][-1] == [30, history["held_out_by_depth"]["16"]]
    assert history["held_out_by_depth"]["16"] < history["held_out_by_depth"]["1"]
    assert (folder / "training.png").stat().st_size > 10_000 and (folder / "training.svg").is_file()
    assert not list((tmp_path / "work").glob("*.checkpoint"))


def test_rqae_from_a_stream_keeps_no_training_states(
    tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = train(
        capsys, monkeypatch, "rqae", *options(tiny_llama, texts, tmp_path / "work"), "--out", tmp_path / "my-rqae",
        "--quantizers", 16, "--steps", 30, "--init-tokens", 4000, "--batch-tokens", 512, "--dtype", "float32", "--stream",
        "--precision", "bfloat16", "--nested-depths", "4,8",
    )  # fmt: skip
    card = json.loads((folder / "card.json").read_text())
    assert 0 < card["fvu"] < 0.6 and card["n_tokens"] == 4000 + 30 * 512
    assert card["n_distinct_tokens"] == min(card["n_tokens"], card["left_out"]["of_tokens"])
    assert not list((tmp_path / "work" / "train").glob("**/hidden.bf16"))
    assert list((tmp_path / "work" / "held-out").glob("**/hidden.bf16"))
