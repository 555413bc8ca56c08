"""The fit of an SAE against dense float64 definitions, for every kind of encoder, in memory and on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evalkit.errors import BadShape, CorpusError
from evalkit.fit import sae as sae_fit
from evalkit.fit.sae import measure_rows
from evalkit.records import Site
from evalkit.sources.sae import weights as sae_weights
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.transforms import Centre, Scale, UnitNorm
from evalkit.sources.sae.weights import Gate, SaeWeights
from evalkit.util.tensor_files import open_safetensors

D, N, ROWS = 12, 40, 70
SITE = Site("toy", "layers.3")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HIDDEN = 2 * normal(ROWS, D, seed=0) + 1
BIAS = 0.3 * normal(D, seed=4)
WEIGHTS = SaeWeights(normal(D, N, seed=1) / D**0.5, 0.2 * normal(N, seed=2), normal(N, D, seed=3) / 4, BIAS)
GATE = Gate(normal(N, seed=5), 0.2 * normal(N, seed=6), normal(N, seed=7))
KINDS = {
    "relu": WEIGHTS,
    "jumprelu": replace(WEIGHTS, threshold=normal(N, seed=8).abs()),
    "gated": replace(WEIGHTS, gate=GATE, shift=BIAS),
    "topk": replace(WEIGHTS, k=5),
    "groupmax": replace(WEIGHTS, k=4, grouped=True),
    "skip, decoder scaled": replace(WEIGHTS, w_skip=normal(D, D, seed=9) / 10, decoder_scaled=True),
}


def literal(weights: SaeWeights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations and reconstruction in dense float64, token by token where the tokens compete."""
    w_enc, b_enc, w_dec, b_dec = (
        np.asarray(each, np.float64) for each in (weights.w_enc, weights.b_enc, weights.w_dec, weights.b_dec)
    )
    pre = (x if weights.shift is None else x - weights.shift.double().numpy()) @ w_enc
    lengths = np.linalg.norm(w_dec, axis=1) if weights.decoder_scaled else np.ones(len(w_dec))
    active = np.maximum((pre + b_enc) * lengths, 0)
    if weights.threshold is not None:
        active[pre + b_enc <= weights.threshold.double().numpy()] = 0
    if weights.gate is not None:
        gate, magnitude, bias = (
            part.double().numpy() for part in (weights.gate.gate_bias, weights.gate.r_mag, weights.gate.mag_bias)
        )
        active = np.maximum(pre * np.exp(magnitude) + bias, 0) * (pre + gate > 0)
    if weights.k is not None:
        for row in active:
            groups = np.split(np.arange(N), weights.k) if weights.grouped else None
            kept = [g[row[g].argmax()] for g in groups] if groups else np.argsort(-row)[: weights.k]
            row[np.setdiff1d(np.arange(N), kept)] = 0
    made = (active / lengths) @ w_dec + b_dec
    return active, made if weights.w_skip is None else made + x @ weights.w_skip.double().numpy().T


def check(found: Any, x: np.ndarray, made: np.ndarray, active: np.ndarray) -> None:
    variance = ((x - x.mean(0)) ** 2).sum()
    assert found.n_tokens == len(x)
    assert found.fvu == pytest.approx(((x - made) ** 2).sum() / variance, rel=1e-5)
    assert found.l0 == pytest.approx((active > 0).sum(1).mean())
    assert found.alive_share == pytest.approx((active > 0).any(0).mean())
    np.testing.assert_array_equal(found.counts, (active > 0).sum(0))
    np.testing.assert_array_equal(found.active, (active > 0).sum(1))
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-6)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, made, strict=True)]
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-5)
    np.testing.assert_allclose(found.norm_ratios, np.linalg.norm(made, axis=1) / np.linalg.norm(x, axis=1), rtol=1e-4)
    centred, moved = x - x.mean(0), made - x.mean(0)
    best = np.linalg.lstsq(moved.reshape(-1, 1), centred.ravel(), rcond=None)[0][0]
    assert found.rescale == pytest.approx(best, rel=1e-4)
    assert found.fvu_rescaled == pytest.approx(((centred - best * moved) ** 2).sum() / variance, rel=1e-5)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_that_of_its_definition(kind: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:  # several blocks, tiles and chunks
        monkeypatch.setattr(sae_fit, "_BLOCK", 16)
        monkeypatch.setattr(sae_fit, "_ROWS", 9)
        monkeypatch.setattr(sae_weights, "_TILE", 16)
    weights, x = KINDS[kind], HIDDEN.double().numpy()
    active, made = literal(weights, x)
    assert 0 < (active > 0).mean() < 1
    check(measure_rows(SaeSource(weights, SITE), HIDDEN), x, made, active)


def test_steps_are_undone_but_for_transcoders() -> None:
    x = HIDDEN.double().numpy()
    centred = x - x.mean(1, keepdims=True)
    scale = 0.5 * D**0.5 / np.linalg.norm(centred, axis=1, keepdims=True)
    active, made = literal(WEIGHTS, centred * scale)
    steps = (Centre(), UnitNorm(), Scale(0.5))
    check(
        measure_rows(SaeSource(WEIGHTS, SITE, steps=steps), HIDDEN), x, made / scale + x.mean(1, keepdims=True), active
    )
    target = normal(ROWS, D, seed=11)
    coder = SaeSource(WEIGHTS, Site("toy", "layers.3", "layers.4"), steps=steps)
    check(measure_rows(coder, HIDDEN, target), target.double().numpy(), made, active)


def test_weights_on_disk_give_the_same(tmp_path: Path) -> None:
    save_file(
        {"w_enc": WEIGHTS.w_enc.contiguous(), "w_dec_t": WEIGHTS.w_dec.T.contiguous()}, tmp_path / "a.safetensors"
    )
    stored = open_safetensors(tmp_path / "a.safetensors")
    lazy = replace(WEIGHTS, w_enc=stored["w_enc"], w_dec=stored["w_dec_t"].T)
    found, wanted = (measure_rows(SaeSource(weights, SITE), HIDDEN) for weights in (lazy, WEIGHTS))
    assert found.fvu == pytest.approx(wanted.fvu, rel=1e-6)
    np.testing.assert_array_equal(found.counts, wanted.counts)


def test_rescaling_finds_the_shrinkage() -> None:
    """A dictionary that gives half of every distance from the mean: α is 2, and nothing is left."""
    eye, mean = torch.eye(D), HIDDEN.mean(0)
    w_enc = torch.cat([eye, -eye], dim=1)
    weights = SaeWeights(w_enc, torch.zeros(2 * D), 0.5 * w_enc.T.contiguous(), mean, shift=mean)
    found = measure_rows(SaeSource(weights, SITE), HIDDEN)
    assert found.fvu == pytest.approx(0.25, rel=1e-5)
    assert found.rescale == pytest.approx(2, rel=1e-5)
    assert found.fvu_rescaled == pytest.approx(0, abs=1e-6)


def test_what_is_all_zero_or_constant_has_no_number_and_no_warning() -> None:
    nothing = replace(WEIGHTS, b_enc=torch.full((N,), -1e3), b_dec=torch.zeros(D))
    found = measure_rows(SaeSource(nothing, SITE), HIDDEN)
    assert (found.l0, found.alive_share) == (0, 0)
    np.testing.assert_array_equal(found.cosines, 0)
    np.testing.assert_array_equal(found.norm_ratios, 0)
    assert np.isnan(measure_rows(SaeSource(WEIGHTS, SITE), HIDDEN[:1]).fvu)


def test_mistakes() -> None:
    with pytest.raises(CorpusError, match="hidden states: expected at least one token; seen none"):
        measure_rows(SaeSource(WEIGHTS, SITE), HIDDEN[:0])
    with pytest.raises(BadShape, match=r"targets of toy/.*: expected shape \(70, 12\); seen \(70, 3\)"):
        measure_rows(SaeSource(WEIGHTS, SITE), HIDDEN, HIDDEN[:, :3])
    with pytest.raises(BadShape, match=r"states of toy/.*: expected shape \(70, 12\); seen \(70, 3\)"):
        measure_rows(SaeSource(WEIGHTS, SITE), HIDDEN[:, :3], HIDDEN)
