"""Tables and figures of parts that are made up, the odd ones among them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from evalkit.errors import BadConfig
from evalkit.inspection.figures import draw_parts
from evalkit.inspection.parts.cache import Part, save_part
from evalkit.inspection.rqae.sae_match import EXAMPLE_SETS, MADE_FROM
from evalkit.inspection.tables import check_format, render_inspection

ABOUT = {
    "name": "toy/layers.1/rqae",
    "format": "rqae",
    "kind": "rqae",
    "width": 4,
    "site": "toy/layers.1",
    "l0": 4.0,
    "fvu": 0.1,
}


def parts(depths: tuple[int, ...], *, mean: float, cost: float) -> list[Part]:
    """All parts, with ``mean`` for correlations (NaN: undefined) and ``cost`` for losses."""
    prefixes = [
        {"depth": d, "tokens": 4300, "prefixes": 544 * d, "tokens_per_prefix": 7.9 / d, "alone": 0.1} for d in depths
    ]
    fit = [
        {"depth": d, "fvu": 0.5 / d, "fvu_normed": 0.4 / d, "loss_change": cost, "se": math.nan, "recovered_zero": 0.99,
         "recovered_mean": 0.98}
        for d in depths
    ]  # fmt: skip
    about_fit = {"loss": 3.0, "ablated": {"zero": {"mean": 9.0, "se": 1.0}, "mean": {"mean": 5.0, "se": 1.0}}}
    ranks = [
        {"depth": d, "tried": 3, "features": 0 if math.isnan(mean) else 3, "mean": mean, "se": abs(mean)}
        for d in depths
    ]
    matches = [
        {"depth": d, "made_from": way, "examples": name, "latents": 2, "mean": mean, "se": abs(mean)}
        for way in MADE_FROM
        for name in EXAMPLE_SETS
        for d in depths
    ]
    cosines = [{"kind": "within a quantizer", "pairs": 10, "sampled": 10, "small": 0.5, "mean": 0.3},
               {"kind": "random directions", "pairs": 0, "sampled": 0, "small": 0.7, "mean": 0.2}]  # fmt: skip
    layers = [{"quantizer": i, "weight": 1 / i, "cumulative": i / 20} for i in range(1, 21)]
    return [
        Part("prefixes", {}, prefixes, notes=["4,300 tokens."]),
        Part("cosines", {}, cosines, {"histograms": {"within a quantizer": [0.5] * 200}, "random": {},
             "spaces": {"across quantizers": 2, "within a quantizer": 2}}),
        Part("layers", {}, layers),
        Part("fit", {}, fit, {**about_fit, "predictions": 100, "tokens": 110}),
        Part("ranks", {}, ranks, {"top": 128, "values": [[mean] * 3 for _ in depths]}),
        Part("sae", {}, matches, {"values": [[[[mean] * 2] * len(depths)] * 2] * 2, "latents": ["1"], "dictionary": "a"}),
    ]  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "usual": {"depths": (1, 2, 4), "mean": 0.5, "cost": 0.1},
    "undefined": {"depths": (1, 2, 4), "mean": math.nan, "cost": -0.001},
    "one depth": {"depths": (4,), "mean": -0.5, "cost": 0.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error")
def test_every_figure_can_be_drawn(case: str, tmp_path: Path) -> None:
    kept = [save_part(tmp_path, part) for part in parts(**CASES[case])]
    paths = draw_parts(ABOUT, kept, tmp_path / "plots")
    assert {path.name for path in paths} == {f"{part.name}.{kind}" for part in kept for kind in ("png", "svg")}
    assert "toy/layers.1/rqae" in (tmp_path / "plots" / "fit.svg").read_text()
    again = draw_parts(ABOUT, kept, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_markdown_rounds_and_carries_notes(tmp_path: Path) -> None:
    kept = [save_part(tmp_path, part) for part in parts(**CASES["usual"])]
    text = render_inspection(ABOUT, kept)
    assert text.startswith("# toy/layers.1/rqae\n\n## Unique code prefixes\n")
    assert "| 2     | 1,088    | 3.95              | 10.0% |" in text
    assert "- 4,300 tokens.\n" in text
    assert "| 1     | 0.5000 | 0.4000     | 0.1000      | 0.9900           | 0.9800           |" in text
    assert "| 4     | 0.500 ± 0.500 | 3/3      |" in text
    assert "| depth | encoder column, top | encoder column, median | top example, top | top example, median |" in text
    assert "| random directions  | –      | exact    | 70.00% | 0.2000 |" in text
    shown = [
        line.split("|")[1].strip()
        for line in text.split("## Layer weights")[1].split("##")[0].splitlines()
        if "|" in line
    ]
    assert shown[2:] == ["1", "2", "4", "8", "16", "20"]
    undefined = render_inspection(ABOUT, [save_part(tmp_path, part) for part in parts(**CASES["undefined"])])
    assert "| 4     | –        | 0/3      |" in undefined


def test_csv_and_json_can_be_read_back(tmp_path: Path) -> None:
    kept = [save_part(tmp_path, part) for part in parts(**CASES["undefined"])]
    table = pd.read_csv(io.StringIO(render_inspection(ABOUT, kept, "csv")))
    assert table["part"].value_counts().to_dict() == {
        "layers": 20, "sae": 12, "prefixes": 3, "fit": 3, "ranks": 3, "cosines": 2,
    }  # fmt: skip
    found = json.loads(render_inspection(ABOUT, kept, "json"))
    assert found["name"] == ABOUT["name"] and found["parts"]["ranks"][0]["mean"] is None


def test_formats_are_three() -> None:
    assert check_format("csv") == "csv"
    with pytest.raises(
        BadConfig, match="format: expected one of markdown, csv, json; seen 'latex'; fix: use 'markdown'"
    ):
        render_inspection(ABOUT, [], "latex")
