import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, special
from scipy.stats import vonmises_fisher

from rqae import RQAE, RqaeConfig, RqaeError, layer_weights, random_codes, vmf
from rqae.vmf import (
    DEFAULT_KAPPA,
    MAX_KAPPA,
    VmfFeatures,
    concentration,
    fit_vmf,
    log_density,
    mean_resultant,
    relevance,
)
from tests.support.random_rqae import random_rqae

KAPPAS = [1e-9, 1e-4, 0.03, 0.5, 1, 5, 12, 31.9, 32, 32.1, 77, 300, 2500, MAX_KAPPA]


def unit(*shape, seed=0):
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vectors / vectors.norm(dim=-1, keepdim=True)


def published_codes(model):
    """The distinct codes that an encoding can have."""
    usable = model.codebook[0].norm(dim=-1) > 0
    return model.canonical[usable].unique()


@pytest.mark.parametrize("width", range(1, 17))
def test_mean_length_is_the_ratio_of_bessel_functions(width):
    kappa = np.array(KAPPAS)
    expected = special.ive(width / 2, kappa) / special.ive(width / 2 - 1, kappa)
    np.testing.assert_allclose(mean_resultant(torch.tensor(kappa), width), expected, rtol=1e-11)
    assert mean_resultant(torch.zeros(1), width).item() == 0


@pytest.mark.parametrize("width", range(2, 9))
def test_log_density_against_scipy(width):
    mean, vectors = unit(width, seed=1), unit(9, width, seed=2)
    for kappa in KAPPAS[2:]:
        expected = vonmises_fisher(mean.numpy(), kappa).logpdf(vectors.numpy())
        found = log_density(mean, torch.tensor(kappa, dtype=torch.float64), vectors)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("width,ring", [(2, 2), (3, 2 * math.pi), (4, 4 * math.pi)])
@pytest.mark.parametrize("kappa", [0, 1e-6, 0.7, 30, 34, 900, MAX_KAPPA])
def test_density_integrates_to_one(width, ring, kappa):
    """Over the angle from the mean: the points at one angle are a sphere of one dimension less, of area ``ring``."""

    def at(angle):
        vector = torch.zeros(width, dtype=torch.float64)
        vector[0], vector[1] = math.cos(angle), math.sin(angle)
        density = log_density(torch.eye(width)[0], torch.tensor(float(kappa)), vector).exp().item()
        return density * ring * math.sin(angle) ** (width - 2)

    edges = [0, min(8 / math.sqrt(kappa), math.pi) if kappa else math.pi, math.pi]
    total = sum(integrate.quad(at, low, high, epsabs=1e-11)[0] for low, high in itertools.pairwise(edges))
    assert total == pytest.approx(1, abs=1e-9)


def test_two_points_are_the_sphere_of_one_dimension():
    mean, both = torch.ones(1), torch.tensor([[1.0], [-1.0]])
    probabilities = log_density(mean, torch.tensor(0.8), both).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    assert (probabilities[0] / probabilities[1]).item() == pytest.approx(math.exp(1.6))


@pytest.mark.parametrize("width", range(1, 9))
def test_concentration_solves_its_equation(width):
    lengths = [1e-6, 0.02, 0.3, 0.7, 0.9, 0.99, 0.999]

    def excess(kappa, length):
        return special.ive(width / 2, kappa) / special.ive(width / 2 - 1, kappa) - length

    expected = [optimize.brentq(excess, 1e-9, 5 * MAX_KAPPA, args=(length,), xtol=1e-13) for length in lengths]
    found = concentration(torch.tensor(lengths, dtype=torch.float64), width)
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    assert concentration(torch.tensor([0.0, 1.0, 1 - 1e-12]), width).tolist()[:2] == [0, MAX_KAPPA]


def test_concentration_ends_at_its_maximum():
    for width in range(2, 9):
        lengths = torch.tensor([1, 1 + 1e-9, 1 - 1e-9, special.ive(width / 2, 2e4) / special.ive(width / 2 - 1, 2e4)])
        assert concentration(lengths, width).tolist() == [MAX_KAPPA] * 4


def cloud(width, kappas, size, seed=0):
    """An RQAE whose codebooks are samples of known distributions, one layer each, and codes that take every sample once."""
    means = unit(len(kappas), width, seed=seed)
    rng = np.random.default_rng(seed)
    codebook = np.stack(
        [
            vonmises_fisher(mean.numpy(), kappa).rvs(size, random_state=rng)
            for mean, kappa in zip(means, kappas, strict=True)
        ]
    )
    model = random_rqae(RqaeConfig(8, width, size, len(kappas), "vq"))
    model = RQAE(model.config, model.w_in, model.b_in, model.w_out, model.b_out, torch.from_numpy(codebook).float())
    return model, means, torch.arange(size)[:, None].expand(-1, len(kappas)), codebook


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_fit_finds_the_distribution_of_a_sample(width):
    kappas, size = [0.5, 3.0, 20.0, 400.0], 4000
    model, means, codes, samples = cloud(width, kappas, size)
    found = fit_vmf(model, codes, kappa_above=0)
    assert found.mean.shape == (1, 4, width) and bool(found.layers.all())
    for layer, kappa in enumerate(kappas):
        mean, concentrated = vonmises_fisher.fit(samples[layer])
        np.testing.assert_allclose(found.mean[0, layer], mean, atol=1e-6)
        assert found.kappa[0, layer].item() == pytest.approx(concentrated, rel=1e-4)
        length = special.ive(width / 2, kappa) / special.ive(width / 2 - 1, kappa)
        information = size * (1 - length**2 - (width - 1) * length / kappa)
        assert abs(found.kappa[0, layer].item() - kappa) < 4 / math.sqrt(information)
        assert float(found.mean[0, layer] @ means[layer]) > 1 - 10 * width / (size * kappa * length)


def literal_relevance(model, tokens, features, peak):
    weights = layer_weights(model).double().numpy()
    values = np.zeros((len(tokens), len(features)))
    for f in range(len(features)):
        chosen = [i for i in range(features.kappa.shape[1]) if features.layers[f, i]]
        for n, token in enumerate(tokens):
            for i in chosen:
                mean = features.mean[f, i].numpy()
                law = vonmises_fisher(mean / np.linalg.norm(mean), features.kappa[f, i].item())
                vector = model.codebook[i][token[i]].double().numpy()
                density = law.pdf(vector / np.linalg.norm(vector)).item()
                values[n, f] += weights[i] * (density / law.pdf(law.mu).item() if peak else density)
        values[:, f] /= sum(weights[i] for i in chosen)
    return values


@pytest.mark.parametrize(
    "config", [RqaeConfig(16, 4, 5, 6), RqaeConfig(16, 3, 4, 6, "fsq"), RqaeConfig(16, 2, 30, 6, "vq")]
)
@pytest.mark.parametrize("density", ["peak", "raw"])
def test_relevance_against_the_definition(config, density, monkeypatch):
    model = random_rqae(config)
    tokens, groups = random_codes(model, 40, 1), [random_codes(model, n, n) for n in (2, 3, 9)]
    features = fit_vmf(model, groups, top_layers=3)
    found = relevance(model, tokens, features, density)
    assert found.shape == (40, 3) and found.dtype == torch.float32
    expected = literal_relevance(model, tokens, features, density == "peak")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(relevance(model, tokens.to(torch.uint16), features, density), found)
    monkeypatch.setattr(vmf, "_TABLE_NUMBERS", 1)  # layer by layer
    torch.testing.assert_close(relevance(model, tokens, features, density), found, rtol=1e-5, atol=1e-7)


def test_relevance_to_one_token_is_the_weighted_share_of_equal_codes():
    model = random_rqae(RqaeConfig(16, num_quantizers=20))
    feature, tokens = random_codes(model, 1, 1), random_codes(model, 50, 2)
    agree = torch.rand(50, 20, generator=torch.Generator().manual_seed(3)) < 0.5
    tokens = torch.where(agree, feature, tokens)
    weights = layer_weights(model)
    expected = ((tokens == feature) * weights).sum(dim=1) / weights.sum()
    found = relevance(model, tokens, fit_vmf(model, feature))
    torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "config", [RqaeConfig(16, 4, 5, 12), RqaeConfig(16, 3, 4, 6, "fsq"), RqaeConfig(16, 4, 30, 6, "vq")]
)
def test_nearest_codes_are_those_nearest_the_mean(config):
    model = random_rqae(config)
    groups = [random_codes(model, count, count) for count in (1, 2, 7)]
    found = fit_vmf(model, groups, top_layers=1).nearest_codes(model, ["a", "b", "c"])
    assert found.labels == ("a", "b", "c") and set(found.origins) == {"tokens"}
    book = model.codebook.double().numpy()
    book = book / np.maximum(np.linalg.norm(book, axis=-1, keepdims=True), 1e-12)
    for row, group in enumerate(groups):
        for layer in range(config.num_quantizers):
            reached = book[layer] @ sum(book[layer][code] for code in group[:, layer].tolist())
            assert reached[found.codes[row, layer]] >= reached.max() - 1e-6
    if config.quantization_method != "fsq":  # whose codes of one direction differ in length
        assert torch.equal(found.codes[:1], groups[0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_relevance_is_bounded_and_one_at_the_means(seed, count):
    model = random_rqae(RqaeConfig(12, num_quantizers=8), seed)
    features = fit_vmf(model, [random_codes(model, count, seed), random_codes(model, 1, seed + 1)], top_layers=5)
    values = relevance(model, torch.cat([random_codes(model, 30, seed), random_codes(model, 1, seed + 1)]), features)
    assert values.min() >= 0 and values.max() <= 1
    assert values[-1, 1].item() == pytest.approx(1, abs=1e-6)


def test_layers_where_the_tokens_agree_are_chosen():
    model = random_rqae(RqaeConfig(16, num_quantizers=30))
    codes = random_codes(model, 40, 1)
    codes[:, 4:30:5] = codes[:1, 4:30:5]
    expected = torch.zeros(30, dtype=torch.bool)
    expected[4::5] = True
    found = fit_vmf(model, [codes])
    assert torch.equal(found.layers[0], expected)
    assert found.kappa[0, expected].tolist() == [MAX_KAPPA] * int(expected.sum())
    assert torch.equal(fit_vmf(model, [codes], top_layers=2).layers[0].nonzero().flatten(), torch.tensor([4, 9]))
    assert not bool(fit_vmf(model, [codes], kappa_above=MAX_KAPPA).layers[0][~expected].any())


def test_opposite_codes_have_no_direction():
    model = random_rqae(RqaeConfig(8, num_quantizers=2))
    grid = model.codebook[0]
    code = 100
    opposite = int((grid @ grid[code]).argmin())
    codes = model.canonical[torch.tensor([[code, code], [opposite, code]])]
    found = fit_vmf(model, codes)
    assert found.kappa.tolist() == [[0, MAX_KAPPA]] and found.layers.tolist() == [[False, True]]
    assert found.mean[0, 0].norm().item() == pytest.approx(1)


@pytest.mark.parametrize("count,low,high", [(2, 0.445, 0.455), (3, 0.18, 0.19), (5, 0.020, 0.022), (10, 4e-5, 8e-5)])
def test_how_often_random_codes_reach_the_default(count, low, high):
    """The shares that the documentation of fit_vmf gives, without its code: kappa from scipy, at the default's length."""
    model = random_rqae(RqaeConfig(4, num_quantizers=1))
    vectors = model.codebook[0][published_codes(model)].numpy()
    drawn = np.random.default_rng(0).integers(len(vectors), size=(1_000_000, count))
    lengths = np.linalg.norm(sum(vectors[drawn[:, k]] for k in range(count)) / count, axis=-1)
    length = special.ive(2, DEFAULT_KAPPA) / special.ive(1, DEFAULT_KAPPA)
    assert low < (lengths >= length).mean() < high
    assert length == pytest.approx(0.72, abs=0.005)


def test_nearest_codes_of_the_published_codebook():
    """What the comment on MAX_KAPPA says."""
    model = random_rqae(RqaeConfig(4, num_quantizers=1))
    vectors = model.codebook[0][published_codes(model)].double()
    cosines = vectors @ vectors.T
    assert math.acos(cosines.fill_diagonal_(-1).max()) == pytest.approx(0.243, abs=0.002)


def test_errors():
    model = random_rqae(RqaeConfig(8, num_quantizers=4))
    codes = random_codes(model, 40, 1)
    with pytest.raises(RqaeError) as error:
        fit_vmf(model, [codes[:1], codes], kappa_above=9999.0)
    assert "feature 1: expected at least one layer in which its tokens agree; seen a largest kappa of " in str(
        error.value
    )
    with pytest.raises(
        RqaeError, match=r"codes of feature 1: expected at least one token, with 4 quantizers.*\[3, 2\]"
    ):
        fit_vmf(model, [codes, codes[:3, :2]])
    with pytest.raises(RqaeError, match="codes of feature 0: expected at least one token"):
        fit_vmf(model, codes[:0])
    with pytest.raises(RqaeError, match="at most one of kappa_above and top_layers"):
        fit_vmf(model, codes, kappa_above=1, top_layers=1)
    with pytest.raises(RqaeError, match="fit_vmf: expected at least one feature"):
        fit_vmf(model, [])
    with pytest.raises(RqaeError, match="top_layers: expected 1 to 4; seen 5"):
        fit_vmf(model, codes, top_layers=5)
    with pytest.raises(RqaeError, match="codes of feature 0: expected 0 to 624; seen 0 to 625"):
        fit_vmf(model, torch.tensor([[0, 625, 3, 4]]))
    features = fit_vmf(model, codes, top_layers=2)
    with pytest.raises(RqaeError, match="relevance: expected codes of 4 quantizers"):
        relevance(model, codes[:, :3], features)
    with pytest.raises(RqaeError, match="density 'sharp'"):
        relevance(model, codes, features, "sharp")
    with pytest.raises(RqaeError, match=r"expected mean \(F, k, c\)"):
        VmfFeatures(features.mean, features.kappa[:, :2], features.layers)
    with pytest.raises(RqaeError, match="kappa from 0 to 10000"):
        VmfFeatures(features.mean, features.kappa * math.nan, features.layers)
