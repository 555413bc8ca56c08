"""Tables and figures of odd SAEs: nothing fires, hubs, one latent, top-k; and what names weights on disk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evalkit.fit.sae import SaeMeasure, measure_rows
from evalkit.inspection.figures import draw_parts
from evalkit.inspection.parts.cache import Part, digest, save_part
from evalkit.inspection.parts.geometry import geometry
from evalkit.inspection.parts.settings import Settings
from evalkit.inspection.sae import measurements
from evalkit.inspection.sae.plan import SaePlan
from evalkit.inspection.tables import render_inspection
from evalkit.records import Site
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.transforms import RmsNorm, Scale
from evalkit.sources.sae.weights import SaeWeights
from evalkit.util.npz_files import open_npz
from evalkit.util.progress import SILENT


def weights(n: int, **changes: Any) -> SaeWeights:
    generator = torch.Generator().manual_seed(0)
    w_enc = torch.randn(8, n, generator=generator)
    return replace(SaeWeights(w_enc, torch.zeros(n), w_enc.T.contiguous() / 8, torch.zeros(8)), **changes)


def hub() -> torch.Tensor:
    """Rows in pairs of opposite directions across, all of them nearest to the first."""
    rows = torch.zeros(90, 100)
    rows[0, 0] = 1
    rows[1:, 0], rows[torch.arange(1, 90), torch.arange(1, 90)] = 0.5, 1
    return rows


class Measured:
    """As much of the material as the parts of the fit ask for."""

    def __init__(self, source: SaeSource, tokens: int = 300) -> None:
        self.source = source
        hidden = torch.randn(tokens, source.weights.d_model, generator=torch.Generator().manual_seed(1))
        self.measured: SaeMeasure = measure_rows(source, hidden)


CASES = {
    "usual": weights(60),
    "top-k": weights(60, k=4),
    "nothing fires": weights(60, b_enc=torch.full((60,), -1e3)),
    "one latent": weights(1),
    "hub": SaeWeights(torch.randn(100, 90), torch.zeros(90), hub(), torch.zeros(100)),
    "zero rows": weights(60, w_dec=torch.zeros(60, 8)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error")
def test_every_table_and_figure_can_be_made(case: str, tmp_path: Path) -> None:
    source = SaeSource(CASES[case], Site("toy", "layers.1"), label=f"toy/{case}")
    made = Measured(source)
    found = {
        "fit": measurements.fit(made),  # type: ignore[arg-type]
        "density": measurements.density(made),  # type: ignore[arg-type]
        "geometry": geometry(source.weights.w_dec, Settings("x", device="cpu"), SILENT),
    }
    parts = [save_part(tmp_path, Part(name, {}, one.rows, one.further, one.notes)) for name, one in found.items()]
    about = SaePlan(Settings("x"), source, ("fit",)).about(parts[0])
    paths = draw_parts(about, parts, tmp_path / "plots")
    assert len(paths) == 6 and f"toy/{case}" in (tmp_path / "plots" / "fit.svg").read_text()
    text = render_inspection(about, parts)
    assert text.startswith(f"# toy/{case}\n") and "nan" not in text
    if case == "hub":
        assert "| latents that share one nearest neighbour | 89" in text
    if case == "top-k":
        assert "| activation      | topk (k = 4)" in text and "| L0             | 4.00 " in text
    if case == "zero rows":
        assert "60 rows are zero and left out" in text
    if case == "nothing fires":
        assert "| never      | 60      | 100.0% |" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cost", [0.2, 0.0, -0.01])
def test_the_figure_of_the_loss(cost: float, tmp_path: Path) -> None:
    rows = [
        {"states": name, "loss": 3 + change, "loss_change": change, "se": abs(change) / 9, "recovered_zero": 0.9,
         "recovered_mean": None}
        for name, change in (("the model's own", 0.0), ("reconstruction", cost), ("mean", 5.0), ("zero", 9.0))
    ]  # fmt: skip
    part = save_part(tmp_path, Part("loss", {}, rows, {"predictions": 100}))
    about = SaePlan(Settings("x"), SaeSource(weights(3), Site("toy", "layers.1")), ()).about(None)
    assert len(draw_parts(about, [part], tmp_path / "plots")) == 2
    assert "| the model's own | 3.0000  | +0.0000 " in render_inspection(about, [part])


def test_weights_on_disk_are_named_by_file_and_vectors(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    np.savez(path, a=np.ones((8, 3), np.float32), b=np.ones((3, 8), np.float32))
    stored = open_npz(path)
    lazy = weights(3, w_enc=stored["a"], w_dec=stored["b"])
    name = digest((lazy, ()))
    assert name == digest((weights(3, w_enc=open_npz(path)["a"], w_dec=open_npz(path)["b"]), ()))
    others = [
        (replace(lazy, b_enc=torch.ones(3)), ()),
        (replace(lazy, w_enc=stored["b"].T), ()),
        (replace(lazy, threshold=torch.zeros(3)), ()),
        (replace(lazy, k=2), ()),
        (replace(lazy, shift=torch.zeros(8)), ()),
        (lazy, (Scale(0.5),)),
        (lazy, (Scale(0.50001),)),
        (lazy, (RmsNorm(gain=torch.ones(8)),)),
        (lazy, (RmsNorm(gain=torch.full((8,), 1.00001)),)),
    ]
    assert len({name, *map(digest, others)}) == 10
    os.utime(path, ns=(1, 1))
    assert digest((lazy, ())) != name
