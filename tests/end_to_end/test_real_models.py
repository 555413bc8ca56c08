"""The real pipeline on the real language model, the shipped dictionaries and the real embedding model."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evalkit.report.tables import summary_table
from evalkit.store.run_store import read_run
from tests.support.hardware import quick_dtype
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow
Runner = Callable[..., Path]
RUN = [sys.executable, "-m", "evalkit", "-q", "run"]
OPTIONS = {
    "-d": "bundled:sae/layer_15/width_2k/average_l0_32",
    "--depths": "16,64",
    "--features": "12",
    "--positives": "10",
    "--negatives": "10",
    "--max-tokens": "24000",
    "--batch-size": "16",
    "--seed": "0",
    "--dtype": quick_dtype(),
}


@pytest.fixture(scope="module")
def run(smollm2: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("real")

    def start(name: str, **changes: str) -> Path:
        options = {**OPTIONS, **{f"--{key.replace('_', '-')}": value for key, value in changes.items()}}
        listed = [part for pair in options.items() for part in pair]
        command = [*RUN, "--model", str(smollm2), "--embedding-model", str(minilm), "-d", "bundled:rqae-256"]
        subprocess.run([*command, *listed, "--out", str(folder / name)], check=True, cwd=ROOT)
        return folder / name

    return start


@pytest.fixture(scope="module")
def first(run: Runner) -> Path:
    return run("first")


def examples(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "examples").iterdir())}


def scores(folder: Path) -> pd.DataFrame:
    table = whole_dictionaries(folder)
    return table[(table["metric"] == "auroc") & (table["judge"] == "embedding")].set_index(["dictionary", "scorer"])


def whole_dictionaries(folder: Path) -> pd.DataFrame:
    """The table without the features that are matched to an RQAE's density."""
    table = summary_table(read_run(folder))
    return table[~table["dictionary"].str.contains("(density", regex=False)]


def test_every_row_is_there_with_honest_counts(first: Path) -> None:
    table = whole_dictionaries(first)
    assert set(table["metric"]) == {"balanced_accuracy", "f1", "auroc", "auprc"}
    assert table.groupby(["judge", "kind"]).size().to_dict() == {
        (judge, kind): 16 if kind == "rqae" else 8
        for judge in ("embedding", "lexical")
        for kind in (
            "rqae",
            "sae",
            *(f"null-{n}" for n in ("random-directions", "random-codes", "planted", "permuted")),
        )
    }
    assert (table.loc[table["kind"] != "null-planted", "n_tried"] == 12).all()
    assert (table["n_tried"] <= 12).all() and (table["n_features"] >= 6).all()
    assert (table["n_features"] <= table["n_tried"] - table["n_ineligible"]).all()
    assert table["null_mean"].notna().all() and table["z"].notna().all()
    assert (table.loc[table["judge"] == "embedding", "se"] > 0).all()  # a lexical judge may find every planted word


def test_the_controls_are_where_they_must_be(first: Path) -> None:
    found = scores(first)
    for scorer in ("detection", "fuzzing"):
        assert found.loc[("smollm2-135m/layers.15/null-planted", scorer), "mean"] >= 0.9
        permuted = found.loc[("smollm2-135m/layers.15/null-permuted", scorer)]
        assert abs(permuted["mean"] - 0.5) <= 2 * permuted["se"]


def test_dictionaries_fit_the_model_they_were_trained_on(first: Path) -> None:
    connection = sqlite3.connect(first / "records.sqlite")
    fits = dict(
        connection.execute(
            "SELECT name, json_extract(measured, '$.fvu_measured') FROM sources WHERE kind IN ('sae', 'rqae')"
        )
    )
    connection.close()
    declared = {"rqae-256/depth-16": 0.49, "rqae-256/depth-64": 0.19, "sae/width-2048/l0-32": 0.18}
    for name, fvu in declared.items():
        assert fits[f"smollm2-135m/layers.15/{name}"] == pytest.approx(fvu, rel=0.15)


def test_another_seed_gives_other_examples_and_a_consistent_ranking(first: Path, run: Runner) -> None:
    other = run("seed", seed="1")
    assert examples(other) != examples(first)
    left, right = scores(first), scores(other)
    assert (left.index == right.index).all()
    distance = (left["mean"] - right["mean"]).abs() / np.sqrt(left["se"] ** 2 + right["se"] ** 2)
    assert (distance < 3.3).all(), distance  # 12 comparisons: 3.3 is passed once in a hundred such tests
    assert distance.median() < 1.5
