"""The SAE source against formulas written independently in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evalkit.errors import BadShape, SiteMismatch, UnknownFeature
from evalkit.fit.sae import measure_fit
from evalkit.protocols import FeatureSource
from evalkit.records import Site, SubjectInfo
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.weights import SaeWeights

SITE = Site("toy", "layers.3")


def numpy_weights(seed: int = 0, d: int = 12, n: int = 30, jump: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {"w_enc": rng.normal(size=(d, n)), "b_enc": rng.normal(size=n)}
    arrays |= {"w_dec": rng.normal(size=(n, d)), "b_dec": rng.normal(size=d)}
    if jump:
        arrays["threshold"] = rng.uniform(0.0, 3.0, size=n)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def numpy_encode(arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """One number at a time: z = x·w + b; z if z > θ and z > 0, else 0."""
    n = arrays["b_enc"].size
    out = np.zeros((*x.shape[:-1], n))
    for where in np.ndindex(*x.shape[:-1]):
        for j in range(n):
            z = sum(float(x[where][i]) * float(arrays["w_enc"][i, j]) for i in range(x.shape[-1]))
            z += float(arrays["b_enc"][j])
            theta = float(arrays["threshold"][j]) if "threshold" in arrays else 0.0
            out[where][j] = z if z > theta and z > 0 else 0.0
    return out


def source(arrays: dict[str, np.ndarray], **options: object) -> SaeSource:
    return SaeSource(SaeWeights(**{name: torch.from_numpy(array) for name, array in arrays.items()}), SITE, **options)


def subject(d_model: int = 12, sites: tuple[str, ...] = ("layers.2", "layers.3")) -> SubjectInfo:
    return SubjectInfo("toy", d_model, 5, np.ones(d_model, np.float32), 1e-6, sites)


@pytest.mark.parametrize("jump", [True, False])
def test_activations_and_reconstruction_match_numpy(jump: bool) -> None:
    arrays = numpy_weights(jump=jump)
    sae = source(arrays)
    x = np.random.default_rng(1).normal(size=(2, 5, 12)).astype(np.float32)
    expected = numpy_encode(arrays, x)
    assert 0.05 < (expected > 0).mean() < 0.95
    seen = sae.activations(torch.from_numpy(x), sae.features())
    np.testing.assert_allclose(seen.numpy(), expected, atol=1e-4)
    rebuilt = np.einsum("bpn,nd->bpd", expected, arrays["w_dec"].astype(np.float64)) + arrays["b_dec"]
    np.testing.assert_allclose(sae.reconstruct(torch.from_numpy(x)).numpy(), rebuilt, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 29), min_size=1, max_size=40), st.integers(0, 2**31))
def test_a_subset_gives_the_same_numbers_as_the_whole(chosen: list[int], seed: int) -> None:
    sae = source(numpy_weights(seed % 7))
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 4, 12)).astype(np.float32))
    whole = sae.activations(x, sae.features())
    part = sae.activations(x, [str(index) for index in chosen])
    torch.testing.assert_close(part, whole[..., chosen], atol=1e-5, rtol=1e-5)


def test_it_is_a_feature_source_with_a_unique_name() -> None:
    sae = source(numpy_weights(), l0=16.0)
    assert isinstance(sae, FeatureSource)
    assert sae.name == "toy/layers.3/sae/width-30/l0-16"
    names = {source(numpy_weights(n=n), l0=l0).name for n in (30, 31) for l0 in (16.0, 32.0, None)}
    assert len(names) == 6
    assert (sae.info.kind, sae.info.width, sae.info.l0, sae.info.site) == ("sae", 30, 16.0, "layers.3")
    assert list(sae.features()) == [str(index) for index in range(30)]
    assert sae.threshold("7") == 0.0


@pytest.mark.parametrize("feature", ["30", "-1", "01", "x", "", "1.0", "²"])
def test_unknown_features_are_named(feature: str) -> None:
    sae = source(numpy_weights(), l0=16.0)
    for ask in (lambda: sae.threshold(feature), lambda: sae.activations(torch.zeros(1, 1, 12), [feature])):
        with pytest.raises(UnknownFeature) as caught:
            ask()
        assert str(caught.value) == (
            f"feature {feature!r} of toy/layers.3/sae/width-30/l0-16: expected a decimal index from 0 to 29; "
            f"seen {feature!r}; fix: choose a feature of this dictionary"
        )


def test_bind_checks_width_and_site() -> None:
    sae = source(numpy_weights())
    assert sae.bind(subject()) is sae
    with pytest.raises(SiteMismatch, match="d_model 12"):
        sae.bind(subject(d_model=16))
    with pytest.raises(SiteMismatch, match=r"module path layers\.3"):
        sae.bind(subject(sites=("layers.1", "layers.30")))


def test_shapes_that_do_not_fit_are_refused() -> None:
    arrays = numpy_weights()
    with pytest.raises(BadShape) as caught:
        source({**arrays, "w_dec": arrays["w_dec"].T.copy()})
    assert str(caught.value) == (
        "tensor w_dec: expected shape (30, 12); seen shape (12, 30); "
        "fix: check that all tensors belong to one SAE and are not transposed"
    )


def test_fit_is_the_textbook_fvu_and_l0() -> None:
    arrays = numpy_weights(3)
    x = np.random.default_rng(4).normal(2.0, 1.0, size=(70, 12)).astype(np.float32)
    activations = numpy_encode(arrays, x)
    rebuilt = activations @ arrays["w_dec"].astype(np.float64) + arrays["b_dec"]
    fvu = ((x - rebuilt) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    fit = measure_fit(source(arrays).weights, torch.from_numpy(x).split(32))
    assert fit.fvu == pytest.approx(fvu, rel=1e-4)
    assert fit.l0 == pytest.approx((activations > 0).sum(1).mean())
    assert fit.alive_share == pytest.approx((activations > 0).any(0).mean())
    assert fit.n_tokens == 70
    with pytest.raises(BadShape):
        measure_fit(source(arrays).weights, [])
