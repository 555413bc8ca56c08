"""The fit check on states whose true dictionary is known, and on the real model with shipped and fresh dictionaries."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evalkit.corpus.tokenisation import tokenize_corpus
from evalkit.errors import SiteMismatch
from evalkit.fit.check import FitReport, check_fit, fit_sites, gather_states
from evalkit.fit.gate import admit
from evalkit.records import Site, TokenBatch
from evalkit.sources import open_dictionary
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.transforms import Centre, Scale, Step, UnitNorm, transformed
from evalkit.sources.sae.weights import SaeWeights
from evalkit.subject.model import Subject
from evalkit.training.activation_store import ActivationStore
from evalkit.training.sae import SaeTrainingConfig, train_sae
from evalkit.util.tensor_files import whole
from tests.support.hardware import quick_dtype

D, N, LENGTH, CONTEXTS = 128, 96, 64, 40
LAYERS = 5


class Layers:
    """States that are sums of four of 96 directions, which turn a little from layer to layer, around a mean."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.directions = [torch.nn.functional.normalize(torch.randn(N, D, generator=g), dim=1)]
        for _ in range(1, LAYERS):
            turned = self.directions[-1] + 0.25 * torch.nn.functional.normalize(torch.randn(N, D, generator=g), dim=1)
            self.directions.append(torch.nn.functional.normalize(turned, dim=1))
        self.mean = torch.randn(D, generator=g) * 4

    def layer_neighbours(self, site: str) -> tuple[str, ...]:
        layer = int(site.split(".")[1])
        return tuple(f"layers.{near}" for near in (layer - 1, layer + 1) if 0 <= near < LAYERS)

    def hidden(self, token_ids: np.ndarray, *, sites: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(int(token_ids.sum()))
        shape = (*token_ids.shape, N)
        codes = (torch.rand(shape, generator=g) < 4 / N) * (6 + 4 * torch.rand(shape, generator=g))
        return {site: codes @ self.directions[int(site.split(".")[1])] + self.mean for site in sites or ()}

    def dictionary(self, layer: int = 2, **further: object) -> SaeSource:
        """The true directions, read by their correlation; what they leave over is small."""
        w = self.directions[layer]
        weights = SaeWeights(w.T.contiguous(), -w @ self.mean, w, self.mean.clone(), torch.full((N,), 4.0))
        return replace(SaeSource(weights, Site("toy", f"layers.{layer}")), **further)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def layers() -> Layers:
    return Layers()


class Tokens:
    """A corpus of random tokens."""

    n_contexts, context_length = CONTEXTS, LENGTH

    def batch(self, rows: np.ndarray) -> TokenBatch:
        ids = np.stack([np.random.default_rng(int(row)).integers(0, 1000, LENGTH) for row in rows])
        valid = np.ones_like(ids, dtype=bool)
        valid[:, 0] = False
        return TokenBatch(ids, valid, np.asarray(rows))


def checked(layers: Layers, source: SaeSource) -> FitReport:
    pairs = fit_sites(layers, source.site)
    batches = [Tokens().batch(np.arange(first, first + 10)) for first in range(0, CONTEXTS, 10)]
    states = gather_states(layers, batches, sorted({site for pair in pairs for site in pair}))
    return check_fit(source, pairs, states)


def scaled(source: SaeSource, factor: float) -> SaeSource:
    """The same dictionary, as if it had been trained on states times ``factor``."""
    w = source.weights
    return replace(
        source, weights=replace(w, w_enc=whole(w.w_enc) / factor, w_dec=whole(w.w_dec) * factor, b_dec=w.b_dec * factor)
    )


def test_the_right_dictionary_passes(layers: Layers) -> None:
    report = checked(layers, layers.dictionary())
    assert report.refusal is None and report.own is not None and report.own.fvu < 0.5
    assert set(report.neighbours) == {"layers.1", "layers.3"}
    assert all(fvu > report.own.fvu for fvu in report.neighbours.values())
    factor = 0.17
    assert checked(layers, replace(scaled(layers.dictionary(), factor), steps=(Scale(factor),))).refusal is None


@pytest.mark.parametrize("layer", [1, 3])
def test_a_neighbouring_layer_is_named(layers: Layers, layer: int) -> None:
    wrong = replace(layers.dictionary(2), site=Site("toy", f"layers.{layer}"))
    refusal = checked(layers, wrong).refusal
    assert refusal is not None and f"own site layers.{layer}" in str(refusal) and "try --site layers.2" in str(refusal)


def broken(layers: Layers) -> dict[str, tuple[SaeSource, str]]:
    right = layers.dictionary()
    w = right.weights
    norm = float(
        torch.cat([layers.hidden(Tokens().batch(np.arange(10)).token_ids, sites=["layers.2"])["layers.2"]])
        .norm(dim=-1)
        .mean()
    )
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    return {
        "doubled b_dec": (replace(right, weights=replace(w, b_dec=2 * w.b_dec)), "one constant vector"),
        "shuffled decoder": (
            replace(right, weights=replace(w, w_dec=whole(w.w_dec)[order])),
            "reconstruction better than the mean",
        ),
        "missing scale": (scaled(right, D**0.5 / norm), "when the states are scaled to"),
        "missing √d": (scaled(right, D**0.5), "multiplied by √d"),
        "superfluous scale": (replace(right, steps=(Scale(0.2),)), "read without the declared transform (scale 0.2)"),
        "superfluous norm": (
            replace(right, steps=(UnitNorm(),)),
            "read without the declared transform (constant norm)",
        ),
        "b_dec not subtracted": (
            replace(right, weights=replace(w, b_enc=w.b_enc + w.b_dec @ whole(w.w_enc))),
            "read with b_dec subtracted",
        ),
        "b_dec subtracted": (replace(right, weights=replace(w, shift=w.b_dec)), "read without subtracting b_dec"),
        "dead": (replace(right, weights=replace(w, threshold=torch.full((N,), 1e6))), "latents that fire"),
    }


@pytest.mark.parametrize("mistake", sorted(broken(Layers())))
def test_mistakes_are_refused_with_their_cause(layers: Layers, mistake: str) -> None:
    source, cause = broken(layers)[mistake]
    refusal = checked(layers, source).refusal
    assert refusal is not None and cause in str(refusal), str(refusal)
    assert "--force continues and marks the results" in str(refusal)


def test_declared_figures_that_are_not_met_are_warned_about(layers: Layers) -> None:
    right = layers.dictionary()
    report = checked(layers, replace(right, l0=50.0, declared={"fvu": 0.01}))
    assert report.refusal is None
    assert [warning.split(" is ")[0] for warning in report.warnings] == ["FVU", "L0"]
    assert checked(layers, replace(right, l0=report.own.l0, declared={"fvu": report.own.fvu})).warnings == ()  # type: ignore[union-attr]


def test_a_check_is_made_once_and_again_for_other_weights(
    layers: Layers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right, path = layers.dictionary(), tmp_path / "fit.json"
    measured = admit([right], layers, Tokens(), path, seed=0)
    assert measured[right.name]["fvu_measured"] < 0.5 and "fingerprint" not in measured[right.name]
    before = path.read_bytes()
    assert admit([right], layers, Tokens(), path, seed=0) == measured and path.read_bytes() == before
    wrong = replace(right, weights=replace(right.weights, b_dec=2 * right.weights.b_dec))
    for _ in range(2):  # refused when it is checked, and from the record
        with pytest.raises(SiteMismatch, match="one constant vector"):
            admit([wrong], layers, Tokens(), path, seed=0)
    with caplog.at_level(logging.WARNING):
        forced = admit([wrong], layers, Tokens(), path, seed=0, force=True)
    assert "fit check failed, continuing because of --force" in caplog.text
    assert "constant vector" in forced[wrong.name]["fit_refused"]["seen"]
    path.write_text("torn {")
    assert admit([right], layers, Tokens(), path, seed=0) == measured
    assert json.loads(path.read_text())[right.name]["fvu_measured"] == measured[right.name]["fvu_measured"]


def test_too_few_tokens_are_no_verdict(layers: Layers) -> None:
    right = replace(layers.dictionary(), site=Site("toy", "layers.3"))
    pairs = fit_sites(layers, right.site)
    batch = Tokens().batch(np.arange(1))
    batch.valid[:, 20:] = False
    report = check_fit(right, pairs, gather_states(layers, [batch], [read for read, _ in pairs]))
    assert report.refusal is None and report.warnings == ("fit check skipped: it needs 64 tokens, the sample has 19",)
    batch.valid[:] = False
    assert check_fit(right, pairs, gather_states(layers, [batch], [read for read, _ in pairs])).refusal is None


def remember_states(subject: Subject) -> None:
    """The checks below read the same contexts two dozen times; the model computes each only once."""
    compute, known, loaded = subject.hidden, dict[bytes, dict[str, torch.Tensor]](), tuple(subject.sites)

    def hidden(token_ids: np.ndarray, sites: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        states = known.setdefault(token_ids.tobytes(), {})
        asked = tuple(sites or loaded)
        if missing := [site for site in asked if site not in states]:
            states |= compute(token_ids, sites=missing)
        return {site: states[site] for site in asked}

    subject.hidden = hidden  # type: ignore[method-assign, assignment]


@pytest.fixture(scope="module")
def real(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Subject, object, Path]]:
    folder = tmp_path_factory.mktemp("fit")
    subject = Subject.load(smollm2, sites=["layers.14", "layers.15", "layers.16"], dtype=quick_dtype())
    remember_states(subject)
    yield subject, tokenize_corpus("bundled:demo", subject.tokenizer, folder / "corpus", max_tokens=30_000), folder


def verdict(real: tuple[Subject, object, Path], source: SaeSource, site: str) -> str:
    subject, corpus, folder = real
    moved = replace(source, site=Site("smollm2-135m", site), label=f"{source.name}@{site}")
    path = folder / "fit.json"
    try:
        admit([moved.bind(subject.info)], subject, corpus, path, seed=0)  # type: ignore[arg-type]
    except SiteMismatch as error:
        return str(error)
    return "passed"


@pytest.mark.slow
def test_shipped_dictionaries_pass_at_their_site_alone(real: tuple[Subject, object, Path]) -> None:
    sources = open_dictionary("bundled:sae") + open_dictionary("bundled:rqae-256")
    assert len(sources) == 8
    subject, corpus, folder = real
    admit([one.bind(subject.info) for one in sources], subject, corpus, folder / "right.json", seed=0)  # type: ignore[arg-type]
    for source in sources:
        for near in ("layers.14", "layers.16"):
            moved = replace(source, site=Site(source.site.model, near))  # type: ignore[type-var]
            with pytest.raises(SiteMismatch, match=r"try --site layers\.15"):
                admit([moved.bind(subject.info)], subject, corpus, folder / f"{near}.json", seed=0)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(UnitNorm(),)], ids=["norm"])
def test_freshly_trained_dictionaries(
    real: tuple[Subject, object, Path], tmp_path: Path, steps: tuple[Step, ...]
) -> None:
    """Trained here on normalised states of the real model: right as declared, refused without its normalisation."""
    subject, corpus, _ = real
    rows = corpus.n_contexts  # type: ignore[attr-defined]

    def states(batch: TokenBatch) -> torch.Tensor:
        found = subject.hidden(batch.token_ids, sites=["layers.15"])["layers.15"]
        sinks = found.norm(dim=-1, keepdim=True) > 1000
        return transformed(torch.where(sinks, found.mean(dim=(0, 1)), found), steps)[0]

    def store(name: str, first: int, last: int) -> ActivationStore:
        batches = (corpus.batch(np.arange(at, min(at + 16, last))) for at in range(first, last, 16))  # type: ignore[attr-defined]
        site = Site("smollm2-135m", "layers.15")
        return ActivationStore.build(
            batches, states, site, tmp_path / name, corpus_name="demo", d_model=576, max_tokens=10**6
        )

    config = SaeTrainingConfig(
        width=512,
        l0=24,
        tokens=300_000,
        batch_size=512,
        learning_rate=3e-3,
        dead_after=50_000,
        bfloat16=quick_dtype() == "bfloat16",
    )
    weights, report = train_sae(store("train", 0, rows - 40), config, held_out=store("held", rows - 40, rows))
    assert report.fit.fvu < 0.7
    source = SaeSource(weights, Site("smollm2-135m", "layers.15"), steps=steps, label=f"fresh {steps}")
    assert verdict(real, source, "layers.15") == "passed"
    for near in ("layers.14", "layers.16"):
        assert "try --site layers.15" in verdict(real, source, near)
    w = source.weights
    doubled = replace(source, weights=replace(w, b_dec=2 * w.b_dec), label=f"doubled {steps}")
    assert "expected" in verdict(real, doubled, "layers.15")
    shuffled = replace(source, weights=replace(w, w_dec=whole(w.w_dec).flip(0)), label=f"shuffled {steps}")
    assert "expected" in verdict(real, shuffled, "layers.15")
    if steps:
        missing = replace(source, steps=(), label=f"missing {steps}")
        assert "expected" in verdict(real, missing, "layers.15")
    else:
        assert verdict(real, replace(source, steps=(Centre(),), label="centred"), "layers.15") == "passed"
