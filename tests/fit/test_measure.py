"""Fit of a dictionary against dense float64 definitions, for every way the states may be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evalkit.fit.measure import States, measure
from evalkit.records import Site
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.transforms import Centre, Scale, UnitNorm
from evalkit.sources.sae.weights import SaeWeights

D, N, T = 12, 40, 300


def weights(**further: object) -> SaeWeights:
    g = torch.Generator().manual_seed(0)
    w_enc = torch.randn(D, N, generator=g)
    parts = (w_enc, torch.randn(N, generator=g) * 0.2, torch.randn(N, D, generator=g) / 8, torch.randn(D, generator=g))
    return SaeWeights(*parts, torch.rand(N, generator=g), **further)  # type: ignore[arg-type]


def states(seed: int, count: int = T) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def dense(w: SaeWeights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w_enc, b_enc, w_dec, b_dec, threshold = (
        np.asarray(part, np.float64) for part in (w.w_enc, w.b_enc, w.w_dec, w.b_dec, w.threshold)
    )
    pre = x @ w_enc + b_enc
    active = np.where((pre > 0) & (pre > threshold), pre, 0)
    return active, active @ w_dec + b_dec


def fvu(target: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    error = target - made
    variance = ((target - target.mean(0)) ** 2).sum()
    return (error**2).sum() / variance, ((error - error.mean(0)) ** 2).sum() / variance


def test_several_sets_are_measured_each_by_itself() -> None:
    w = weights()
    source = SaeSource(w, Site("m", "layers.1"), steps=(Scale(0.5),))
    x, other = states(1), states(2, 170)
    shift = torch.linspace(-1, 1, D)
    sets = [
        States(x, x),
        States(other, other),
        States(x, x, further=(UnitNorm(3.0),)),
        States(x, x, own_steps=False),
        States(x, x, offset=shift),
        States(x, x, further=(Centre(),)),
    ]
    found = measure(source, sets)
    raw, second = x.double().numpy(), other.double().numpy()
    norms = np.linalg.norm(raw * 0.5, axis=1, keepdims=True)
    mean = (raw * 0.5).mean(1, keepdims=True)
    expected = []
    for target, seen, back in (
        (raw, raw * 0.5, lambda y: y / 0.5),
        (second, second * 0.5, lambda y: y / 0.5),
        (raw, raw * 0.5 * 3 / norms, lambda y: y * norms / 3 / 0.5),
        (raw, raw, lambda y: y),
        (raw, raw * 0.5 + shift.double().numpy(), lambda y: y / 0.5),
        (raw, raw * 0.5 - mean, lambda y: (y + mean) / 0.5),
    ):
        active, made = dense(w, seen)
        expected.append((*fvu(target, back(made)), (active > 0).sum(1).mean(), (active > 0).sum(0)))
    for fit, (whole, centred, l0, fired) in zip(found, expected, strict=True):
        assert fit.fvu == pytest.approx(whole, rel=1e-4) and fit.fvu_centred == pytest.approx(centred, rel=1e-4)
        assert fit.l0 == pytest.approx(l0) and fit.fired is not None
        np.testing.assert_array_equal(fit.fired.numpy(), fired)
        assert fit.alive_share == pytest.approx((fired > 0).mean())
    assert [fit.n_tokens for fit in found] == [T, 170, T, T, T, T]


def test_a_transcoder_is_held_against_what_it_reconstructs() -> None:
    w = weights()
    source = SaeSource(w, Site("m", "layers.1.mlp:in", "layers.1.mlp"), steps=(Scale(2.0),))
    x, target = states(1), states(2)
    (fit,) = measure(source, [States(x, target)])
    assert fit.fvu == pytest.approx(fvu(target.double().numpy(), dense(w, x.double().numpy() * 2)[1])[0], rel=1e-4)


class Halves:
    """A source that is no SAE."""

    name, site = "halves", Site("m", "layers.1")

    def reconstruct(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden / 2


def test_any_source_that_reconstructs_is_measured() -> None:
    x = states(3)
    (fit,) = measure(Halves(), [States(x, x)])  # type: ignore[arg-type]
    assert fit.fvu == pytest.approx(fvu(x.double().numpy(), x.double().numpy() / 2)[0], rel=1e-5)
    assert fit.l0 is None and fit.alive_share is None


@pytest.mark.parametrize(("kept", "expected"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.25)])
def test_fvu_in_closed_form(kept: float, expected: float) -> None:
    x = states(4)
    mean = x.mean(dim=0)

    class Shrunk(Halves):
        def reconstruct(self, hidden: torch.Tensor) -> torch.Tensor:
            return mean + kept * (hidden - mean)

    (fit,) = measure(Shrunk(), [States(x, x)])  # type: ignore[arg-type]
    assert fit.fvu == pytest.approx(expected, abs=1e-5) and fit.fvu_centred == pytest.approx(expected, abs=1e-5)
