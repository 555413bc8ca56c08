"""``evalkit inspect`` of plain directions and of exports: no model is loaded; numbers by hand."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.sources.data.make_neuronpedia import write_dump
from tests.support.command_line import call

N, DIM = 40, 12


@pytest.fixture
def matrix(tmp_path: Path) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32)
    vectors[7] = 3 * vectors[5] + 0.01 * vectors[7]
    save_file({"v": vectors}, tmp_path / "probes.safetensors")
    (tmp_path / "card.json").write_text(json.dumps({"site": "layers.2", "model": "toy"}))
    return vectors


Call = Any


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    def command(*arguments: object) -> tuple[int, str, str]:
        return call(capsys, monkeypatch, "-q", "inspect", *arguments)

    return command


def test_directions_have_a_geometry(matrix: np.ndarray, tmp_path: Path, inspect: Call) -> None:
    arguments = (tmp_path, "--out", tmp_path / "look")
    code, out, err = inspect(*arguments, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["kind"], found["format"], found["width"], found["vectors"]) == (
        "directions",
        "directions",
        N,
        [N, DIM],
    )
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    cosines = unit @ unit.T - 9 * np.eye(N)
    rows = {row["statistic"]: row for row in found["parts"]["geometry"]}
    largest = rows["largest nearest-neighbour cosine"]
    assert largest["value"] == pytest.approx(cosines.max(), abs=1e-6) and set(largest["latents"]) == {5, 7}
    assert rows["directions that share one nearest neighbour"]["value"] == np.bincount(cosines.argmax(1)).max()
    _, text, _ = inspect(*arguments)
    assert "| vectors    | 40 × 12" in text and "latents that" not in text and "decoder" not in text
    assert {path.name for path in (tmp_path / "look" / "plots").iterdir()} == {"geometry.png", "geometry.svg"}
    assert "40 directions in 12 dimensions" in (tmp_path / "look" / "plots" / "geometry.svg").read_text()


def test_other_weights_of_the_same_name_are_measured_anew(matrix: np.ndarray, tmp_path: Path, inspect: Call) -> None:
    first = json.loads(inspect(tmp_path, "--out", tmp_path / "look", "--json")[1])
    save_file({"v": matrix[::-1].copy()}, tmp_path / "probes.safetensors")
    again = json.loads(inspect(tmp_path, "--out", tmp_path / "look", "--json")[1])
    assert first["parts"]["geometry"][0]["latents"] != again["parts"]["geometry"][0]["latents"]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write_dump(tmp_path / "v1")


def test_an_export_says_how_often_its_features_fire(export: Path, tmp_path: Path, inspect: Call) -> None:
    with gzip.open(export / "features" / "batch-0.jsonl.gz", "rt") as lines:
        shares = {int(said["index"]): said["frac_nonzero"] for said in map(json.loads, lines)}
    arguments = (export, "--out", tmp_path / "look")
    code, out, err = inspect(*arguments, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["kind"] == "neuronpedia" and found["site"].endswith(found["reconstructs"])
    rows = found["parts"]["density"]
    assert sum(row["latents"] for row in rows) == len(shares) and rows[0]["latents"] == 0
    for row in rows[1:]:
        inside = [share for share in shares.values() if row["low"] <= np.log10(share) < row["high"]]
        assert row["latents"] == len(inside)
    kept = json.loads((tmp_path / "look" / "density.json").read_text())
    assert kept["further"]["most"][0] == {"latent": max(shares, key=shares.get), "rate": max(shares.values())}  # type: ignore[arg-type]
    assert kept["further"]["median"] == pytest.approx(np.median(list(shares.values())))
    _, text, _ = inspect(*arguments)
    assert "as declared by the export" in text and "latent" not in text.replace("| latents |", "")
    assert {path.name for path in (tmp_path / "look" / "plots").iterdir()} == {"density.png", "density.svg"}


def test_an_export_without_features_is_one_line(export: Path, tmp_path: Path, inspect: Call) -> None:
    shutil.rmtree(export / "features")
    code, out, err = inspect(export, "--out", tmp_path / "look")
    assert (code, out) == (2, "") and "expected frac_nonzero of the features" in err and "Traceback" not in err


@pytest.mark.parametrize("given", [("--only", "fit"), ("--sae", "bundled:sae/layer_15/width_1k/average_l0_32")])
def test_what_directions_do_not_have_is_one_line(
    given: tuple[str, str], matrix: np.ndarray, tmp_path: Path, inspect: Call
) -> None:
    code, out, err = inspect(tmp_path, "--out", tmp_path / "look", *given)
    assert (code, out) == (2, "") and f"{given[0]}: expected" in err and "Traceback" not in err
