"""``evalkit inspect`` of SAEs and transcoders on a tiny model: numbers by hand, the folder, tables, figures, mistakes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from evalkit.cli import app
from evalkit.corpus.contexts import Corpus
from evalkit.inspection import inspect as inspect_module
from evalkit.inspection.inspect import inspect_dictionary
from evalkit.inspection.parts import states
from evalkit.inspection.parts.settings import Settings, parse_parts
from evalkit.records import Site
from evalkit.sources.sae.source import SaeSource
from evalkit.util.npz_files import open_npz
from tests.support.command_line import call
from tests.support.dictionaries import write_sae
from tests.support.hardware import quick_dtype

WIDTH = 48


def text(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    words = ["whale", "ship", "sea", "deck", "calm", "night", "storm", "captain", "1851", "(boat)"]
    lines = [json.dumps({"text": " ".join(generator.choice(words, 120))}) for _ in range(12)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder / "text.jsonl"


def options(model: Path, folder: Path, out: Path) -> list[str]:
    return [
        "--model", str(model), "--corpus", str(text(folder)), "--dtype", "float32", "--fit-tokens", "1000000",
        "--context-length", "64", "--out", str(out),
    ]  # fmt: skip


class Case:
    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.out = model, folder / "out"
        self.sae = write_sae(folder / "sae", 32, WIDTH, 10, bias=-0.02)
        arrays = dict(np.load(self.sae / "params.npz"))
        arrays["W_dec"] *= 0.5
        arrays["b_enc"][:3] = -1e3
        np.savez(self.sae / "params.npz", **arrays)
        (self.sae / "card.json").write_text(json.dumps({"l0": 10.5, "fvu": 0.5}))
        self.arguments = ["inspect", str(self.sae), *options(model, folder, self.out)]
        self.stdout = ""

    def part(self, name: str) -> dict[str, Any]:
        return json.loads((self.out / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def case(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = Case(tiny_llama, tmp_path_factory.mktemp("inspect-sae"))
    result = CliRunner().invoke(app, ["-q", *made.arguments, "--only", "all"])
    assert result.exit_code == 0, result.output
    made.stdout = result.stdout
    return made


class ByHand:
    """States by transformers, activations and reconstructions in dense float64."""

    def __init__(self, case: Case) -> None:
        self.corpus = Corpus.open(case.out / "corpus")
        self.whole = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
        self.ids = torch.from_numpy(self.corpus.tokens.astype(np.int64))
        with torch.no_grad():
            self.states = self.whole(self.ids, output_hidden_states=True).hidden_states
        self.places = [(row, at) for row in range(len(self.ids)) for at in range(1, self.corpus.lengths[row])]
        self.arrays = {name: value.astype(np.float64) for name, value in np.load(case.sae / "params.npz").items()}
        self.hidden = self.at(3)
        self.active = self.encode(self.hidden)
        self.made = self.active @ self.arrays["W_dec"] + self.arrays["b_dec"]

    def at(self, layer: int) -> np.ndarray:
        rows, positions = np.array(self.places).T
        return self.states[layer + 1][rows, positions].double().numpy()

    def encode(self, hidden: np.ndarray) -> np.ndarray:
        pre = hidden @ self.arrays["W_enc"] + self.arrays["b_enc"]
        return np.maximum(pre, 0) * (pre > self.arrays["threshold"])


@pytest.fixture(scope="module")
def by_hand(case: Case) -> ByHand:
    return ByHand(case)


def test_fit(case: Case, by_hand: ByHand) -> None:
    (row,), x, made, active = case.part("fit")["rows"], by_hand.hidden, by_hand.made, by_hand.active
    variance = ((x - x.mean(0)) ** 2).sum()
    assert row["tokens"] == len(x)
    assert row["l0"] == pytest.approx((active > 0).sum(1).mean(), rel=1e-4) and 1 < row["l0"] < WIDTH / 2
    assert row["fvu"] == pytest.approx(((x - made) ** 2).sum() / variance, rel=1e-3)
    lengths = np.linalg.norm(x, axis=1), np.linalg.norm(made, axis=1)
    cosines = (x * made).sum(1) / lengths[0] / np.maximum(lengths[1], 1e-12)
    assert row["cosine"] == pytest.approx(cosines.mean(), rel=1e-3)
    assert row["norm_ratio"] == pytest.approx((lengths[1] / lengths[0]).mean(), rel=1e-3)
    steps = np.linspace(0, 5, 5001)  # α by trying
    moved = made - x.mean(0)
    errors = [
        ((x - x.mean(0)) ** 2).sum() - 2 * a * ((x - x.mean(0)) * moved).sum() + a * a * (moved**2).sum() for a in steps
    ]
    assert row["rescale"] == pytest.approx(steps[np.argmin(errors)], abs=2e-3)
    assert row["fvu_rescaled"] == pytest.approx(min(errors) / variance, rel=1e-3)
    assert row["alive_share"] == pytest.approx((active > 0).any(0).mean())
    assert (row["l0_declared"], row["fvu_declared"]) == (10.5, 0.5)
    for name, values in (("l0", (active > 0).sum(1)), ("cosine", cosines)):
        shown = case.part("fit")["further"]["by_token"][name]
        edges, shares = np.array(shown["edges"]), np.array(shown["shares"])
        assert shares.sum() == pytest.approx(1)
        middles = (edges[1:] + edges[:-1]) / 2
        assert middles @ shares == pytest.approx(values.mean(), rel=0.05)


def test_density(case: Case, by_hand: ByHand) -> None:
    part = case.part("density")
    rates = (by_hand.active > 0).mean(0)
    assert part["rows"][0]["latents"] == (rates == 0).sum() >= 3
    assert sum(row["latents"] for row in part["rows"]) == WIDTH
    edges = [-6 + 0.25 * step for step in range(25)]
    assert [row["low"] for row in part["rows"][1:]] == edges[:-1] and part["rows"][-1]["high"] == 0
    for row in part["rows"][1:]:
        inside = [rate for rate in rates if rate and row["low"] <= np.log10(rate) < row["high"] + (row["high"] == 0)]
        assert row["latents"] == pytest.approx(len(inside), abs=1)  # float32 at a threshold, at an edge
        assert row["share"] == row["latents"] / WIDTH
    assert part["further"]["median"] == pytest.approx(np.median(rates[rates > 0]), rel=0.01)
    assert part["further"]["most"][0]["latent"] == rates.argmax()


def test_geometry(case: Case, by_hand: ByHand) -> None:
    part = case.part("geometry")
    unit = by_hand.arrays["W_dec"] / np.linalg.norm(by_hand.arrays["W_dec"], axis=1, keepdims=True)
    cosines = unit @ unit.T - 9 * np.eye(WIDTH)
    nearest = cosines.max(1)
    rows = {row["statistic"]: row for row in part["rows"]}
    ranked = np.sort(nearest)[::-1]
    assert rows["largest nearest-neighbour cosine"]["value"] == pytest.approx(ranked[0], abs=1e-6)
    assert rows["10th largest nearest-neighbour cosine"]["value"] == pytest.approx(ranked[9], abs=1e-6)
    assert "100th largest nearest-neighbour cosine" not in rows  # there are 48
    assert rows["median nearest-neighbour cosine"]["value"] == pytest.approx(np.median(nearest), abs=1e-6)
    assert set(rows["largest nearest-neighbour cosine"]["latents"]) == set(
        np.unravel_index(cosines.argmax(), cosines.shape)
    )
    degrees = np.bincount(cosines.argmax(1), minlength=WIDTH)
    hub = rows["latents that share one nearest neighbour"]
    assert hub["value"] == degrees.max() and degrees[hub["latents"][0]] == degrees.max() and hub["random"] >= 2
    assert part["further"]["in_degrees"] == np.bincount(degrees).tolist()
    drawn = np.random.default_rng(0).normal(size=(300, WIDTH, 32))
    drawn /= np.linalg.norm(drawn, axis=2, keepdims=True)
    pairs = np.einsum("tnd,tmd->tnm", drawn, drawn) - 9 * np.eye(WIDTH)
    every = np.sort(pairs.max(2).ravel())[::-1]
    assert rows["10th largest nearest-neighbour cosine"]["random"] == pytest.approx(every[10 * 300], abs=0.01)
    assert rows["median nearest-neighbour cosine"]["random"] == pytest.approx(np.median(every), abs=0.01)


def test_loss(case: Case, by_hand: ByHand) -> None:
    rows = {row["states"]: row for row in case.part("loss")["rows"]}
    mean = torch.from_numpy(by_hand.hidden.mean(0)).float()
    made = {
        "the model's own": lambda x: x,
        "reconstruction": lambda x: torch.from_numpy(
            by_hand.encode(x.double().numpy()) @ by_hand.arrays["W_dec"] + by_hand.arrays["b_dec"]
        ).float(),
        "mean": lambda x: mean.expand_as(x),
        "zero": torch.zeros_like,
    }
    losses = {name: loss_by_hand(by_hand, replace) for name, replace in made.items()}
    for name, loss in losses.items():
        assert rows[name]["loss"] == pytest.approx(loss, abs=1e-3)
        assert rows[name]["loss_change"] == pytest.approx(loss - losses["the model's own"], abs=1e-3)
    recovered = (losses["zero"] - losses["reconstruction"]) / (losses["zero"] - losses["the model's own"])
    assert rows["reconstruction"]["recovered_zero"] == pytest.approx(recovered, abs=2e-2)
    assert rows["zero"]["recovered_zero"] == rows["mean"]["recovered_mean"] == 0


def loss_by_hand(by_hand: ByHand, replace: Any) -> float:
    """Mean loss of all predictions between valid tokens, with a plain hook at the block."""

    def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :1], replace(output[0, 1:])[None]], dim=1)

    losses = []
    handle = by_hand.whole.model.layers[3].register_forward_hook(hook)
    try:
        for row, length in enumerate(by_hand.corpus.lengths):
            ids = by_hand.ids[row, :length]
            with torch.no_grad():
                chances = by_hand.whole(ids[None]).logits[0].log_softmax(-1)
            losses += [-float(chances[at, ids[at + 1]]) for at in range(1, length - 1)]
    finally:
        handle.remove()
    return float(np.mean(losses))


def test_tables(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.stdout.startswith(f"# {case.model.name}/layers.3/sae/width-48/l0-10\n\n| ")
    assert "| W_enc           | 32 × 48" in case.stdout and "| activation      | jumprelu" in case.stdout
    assert case.stdout.count("\n## ") == 4 and "| never " in case.stdout
    assert "## Reconstruction\n\n|                | measured | declared |" in case.stdout
    assert "| FVU            | 0." in case.stdout and "| 0.5000   |" in case.stdout
    code, out, _ = call(capsys, monkeypatch, "-q", *case.arguments, "--json")
    found = json.loads(out)
    assert code == 0 and list(found)[:7] == ["name", "format", "kind", "width", "site", "l0", "fvu"]
    assert list(found["parts"]) == ["fit", "density", "geometry"]  # loss only where it is named
    assert (found["kind"], found["width"], found["site"]) == ("sae", 48, f"{case.model.name}/layers.3")
    assert (found["l0"], found["fvu"]) == tuple(case.part("fit")["rows"][0][name] for name in ("l0", "fvu"))
    assert (found["w_enc"], found["w_dec"], found["l0_declared"]) == ([32, 48], [48, 32], 10.5)
    code, out, _ = call(capsys, monkeypatch, "-q", *case.arguments, "--only", "geometry", "--json")
    assert (json.loads(out)["l0"], json.loads(out)["fvu"]) == (10.5, 0.5)
    code, out, _ = call(capsys, monkeypatch, "-q", *case.arguments, "--only", "loss,density", "--format", "csv")
    table = pd.read_csv(io.StringIO(out))
    assert table["part"].tolist() == ["about", *["density"] * 25, *["loss"] * 4]
    assert table["width"].dropna().tolist() == [48]


def test_figures_and_nothing_twice(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = {path: path.read_bytes() for path in (case.out / "plots").iterdir()}
    assert {path.stem for path in pictures} == {"fit", "density", "geometry", "loss"}
    assert all(len(data) > 10_000 for path, data in pictures.items() if path.suffix == ".png")
    monkeypatch.setattr(states, "find_model", None)
    code, out, err = call(capsys, monkeypatch, "-q", *case.arguments, "--only", "all")
    assert (code, out) == (0, case.stdout), err
    assert {path: path.read_bytes() for path in (case.out / "plots").iterdir()} == pictures


def test_other_weights_and_other_tokens_are_measured_again(
    case: Case, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Case(tiny_llama, tmp_path)
    code, *_ = call(capsys, monkeypatch, "-q", *other.arguments)
    first = {name: other.part(name) for name in ("fit", "density", "geometry")}
    assert code == 0 and first["fit"]["rows"] == case.part("fit")["rows"]
    code, *_ = call(capsys, monkeypatch, "-q", *other.arguments, "--fit-tokens", "200")
    assert code == 0 and other.part("fit")["rows"][0]["tokens"] < 300
    assert other.part("geometry") == first["geometry"]
    arrays = dict(np.load(other.sae / "params.npz"))
    arrays["W_dec"] *= 2
    np.savez(other.sae / "params.npz", **arrays)
    code, _, err = call(capsys, monkeypatch, "-q", *other.arguments)
    assert code == 0, err
    assert other.part("fit")["rows"][0]["fvu"] != first["fit"]["rows"][0]["fvu"]


def opened(case: Case, monkeypatch: pytest.MonkeyPatch, site: Site) -> SaeSource:
    """The SAE's weights as a dictionary of another site, whatever is opened."""
    arrays = open_npz(case.sae / "params.npz")
    made = inspect_module.load_source(str(case.sae), subject="toy")
    weights = replace(made.weights, w_enc=arrays["W_enc"], w_dec=arrays["W_dec"])
    source = SaeSource(weights, site, label=f"{site}/mine")
    monkeypatch.setattr(inspect_module, "load_source", lambda path, **options: source)
    return source


def test_a_transcoder_is_held_against_the_site_it_reconstructs(
    case: Case, by_hand: ByHand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(case, monkeypatch, Site(str(case.model), "layers.3", "layers.4"))
    settings = Settings(str(case.sae), corpus=str(text(tmp_path)), dtype="float32", fit_tokens=10**6, context_length=64)
    found = inspect_dictionary(settings, tmp_path / "out")
    (row,), target = found.parts[0].rows, by_hand.at(4)
    fvu = ((target - by_hand.made) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
    assert row["fvu"] == pytest.approx(fvu, rel=1e-3)
    assert row["l0"] == pytest.approx((by_hand.active > 0).sum(1).mean(), rel=1e-4)
    assert (found.about["kind"], found.about["reconstructs"]) == ("transcoder", "layers.4")
    assert [part.name for part in found.parts] == ["fit", "density", "geometry"]


@pytest.mark.parametrize("site", [("layers.3", "layers.4"), ("layers.3.mlp:in", None)])
def test_a_loss_needs_a_reconstruction_of_what_is_read(
    site: tuple[str, str | None], case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(case, monkeypatch, Site(str(case.model), *site))
    with pytest.raises(inspect_module.BadConfig) as caught:
        inspect_dictionary(Settings(str(case.sae)), tmp_path / "out", ["loss"])
    assert str(caught.value) == (
        "--only loss: expected a dictionary that reconstructs the output of the module it reads; "
        f"seen {site[0]} → {site[1] or site[0]}; fix: leave the part loss out"
    )


def test_the_default_folder_is_called_after_the_dictionary(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, *_ = call(capsys, monkeypatch, "-q", *case.arguments[:-2], "--only", "geometry")
    assert code == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["inspect-tiny-llama-layers.3-sae-width-48-l0-10"]


MISTAKES = {
    "no such part": (
        ["--only", "prefixes"],
        "--only: expected some of fit, density, geometry, loss, the parts of a dict",
    ),
    "sae": (
        ["--sae", "bundled:sae/layer_15/width_1k/average_l0_32"],
        "--sae: expected an RQAE to compare with that SAE",
    ),
    "format": (["--format-name", "nonsense"], "nonsense"),
    "no such model": (["--model", "nowhere/model"], "nowhere/model"),
    "site": (["--site", "layers.99"], "layers.99"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    mistake: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, fragment = MISTAKES[mistake]
    code, out, err = call(capsys, monkeypatch, "-q", *Case(tiny_llama, tmp_path).arguments, *given)
    assert (code, out) == (2, ""), err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert fragment in err and "Traceback" not in err


def test_parts_of_a_kind() -> None:
    assert parse_parts((), has_sae=False, kind="sae") == ("fit", "density", "geometry")
    assert parse_parts(("all",), has_sae=False, kind="sae") == ("fit", "density", "geometry", "loss")
    assert parse_parts(("loss,fit",), has_sae=False, kind="transcoder") == ("fit", "loss")
    assert parse_parts(("all",), has_sae=False)[-1] == "ranks"


def test_a_kind_without_parts_is_refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(SaeSource):
        kind = "odd"  # type: ignore[assignment]

    source = opened(case, monkeypatch, Site("toy", "layers.3"))
    odd = Odd(source.weights, source.site)
    monkeypatch.setattr(inspect_module, "load_source", lambda path, **options: odd)
    with pytest.raises(inspect_module.BadConfig, match=r"a kind that can be inspected \(.*\); seen one of kind odd"):
        inspect_dictionary(Settings(str(case.sae)), tmp_path / "out")


@pytest.mark.slow
def test_a_shipped_sae_on_the_real_model(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its card declares is measured."""
    code, out, err = call(
        capsys, monkeypatch, "-q", "inspect", "bundled:sae/layer_15/width_2k/average_l0_32", "--model", smollm2, "--out",
        tmp_path / "out", "--max-tokens", 10_000, "--only", "all", "--json", "--dtype", quick_dtype(),
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["fvu"] == pytest.approx(found["fvu_declared"], rel=0.1)
    assert found["l0"] == pytest.approx(found["l0_declared"], rel=0.1)
    (fit,) = found["parts"]["fit"]
    assert fit["rescale"] == pytest.approx(1, abs=0.02) and fit["cosine"] > 0.93 and fit["alive_share"] > 0.95
    loss = {row["states"]: row for row in found["parts"]["loss"]}
    assert 0.96 < loss["reconstruction"]["recovered_zero"] < 1
