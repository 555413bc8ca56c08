import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rqae import RQAE, RqaeConfig, RqaeError, intensity, layer_weights, random_codes
from rqae.features import intensity_literal
from tests.support.random_rqae import random_rqae


def some_codes(model, count, seed):
    return model.encode(torch.randn(count, model.config.dim, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(
    "config", [RqaeConfig(16, 4, 5, 20), RqaeConfig(16, 3, 3, 9, "fsq"), RqaeConfig(16, 4, 30, 9, "vq")]
)
def test_matches_the_gather_per_feature(config):
    model = random_rqae(config)
    tokens, features = some_codes(model, 60, 1), some_codes(model, 7, 2)
    depths = (9, 1, 4)
    found = intensity(model, tokens, features, depths)
    assert found.shape == (3, 60, 7)
    for depth, values in zip(depths, found, strict=True):
        torch.testing.assert_close(values, intensity_literal(model, tokens, features, depth), rtol=0, atol=2e-6)


def test_depth_k_is_the_first_k_quantizers():
    model = random_rqae(RqaeConfig(16, num_quantizers=8))
    tokens, features = some_codes(model, 30, 1), some_codes(model, 3, 2)
    before = intensity(model, tokens, features, (5,))
    tokens[:, 5:] = 0
    assert torch.equal(intensity(model, tokens, features, (5,)), before)
    tokens[:, 4] = model.canonical[(tokens[:, 4] + 100) % 625]
    assert not torch.equal(intensity(model, tokens, features, (5,)), before)


def test_closed_form():
    """Two quantizers of weights 3 and 1; the codes agree in the first and are at 45 degrees in the second."""
    w_out = torch.stack([3 * torch.eye(4), torch.eye(4)])
    model = RQAE(
        RqaeConfig(4, num_quantizers=2), torch.eye(4).repeat(2, 1, 1), torch.zeros(2, 4), w_out, torch.zeros(2, 4)
    )
    assert layer_weights(model).tolist() == [3.0, 1.0]
    east = model.encode(torch.tensor([1.0, 0, 0, 0]), 1).item()
    diagonal = model.encode(torch.tensor([1.0, 1, 0, 0]), 1).item()
    values = intensity(model, torch.tensor([[east, diagonal]]), torch.tensor([[east, east]]), (1, 2))
    assert values[0].item() == pytest.approx(1)
    assert values[1].item() == pytest.approx((3 + math.sqrt(0.5)) / 4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 10))
def test_bounded_symmetric_and_one_with_itself(seed, depth):
    model = random_rqae(RqaeConfig(12, num_quantizers=10), seed)
    codes = random_codes(model, 6, seed)
    values = intensity(model, codes, codes, (depth,))[0]
    assert values.abs().max() <= 1
    torch.testing.assert_close(values, values.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(values.diagonal(), torch.ones(6), rtol=0, atol=1e-5)


def test_random_codes_are_uniform_over_the_distinct_codes():
    model = random_rqae(RqaeConfig(8, num_quantizers=400))
    codes = random_codes(model, 200, 1)
    assert torch.equal(codes, random_codes(model, 200, 1))
    assert not torch.equal(codes, random_codes(model, 200, 2))
    assert torch.equal(model.canonical[codes], codes)
    shares = torch.bincount(codes.flatten(), minlength=625) / codes.numel()
    assert int((shares > 0).sum()) == 544 and shares[312] == 0
    assert float(shares.max()) < 2 / 544 and float(shares[shares > 0].min()) > 0.5 / 544


def test_too_deep_is_an_error():
    model = random_rqae(RqaeConfig(8, num_quantizers=4))
    codes = random_codes(model, 2, 1)
    with pytest.raises(RqaeError, match=r"intensity depths: expected 1 to 3; seen \[4\]"):
        intensity(model, codes[:, :3], codes, (4,))
