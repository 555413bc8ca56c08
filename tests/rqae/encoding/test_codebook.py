import itertools
from math import gcd

import numpy as np
import pytest
import torch

from rqae import RqaeConfig, RqaeError
from rqae.encoding.codebook import canonical_indices, distinct_codes, grid_codebook, sorted_patterns

PUBLISHED = RqaeConfig(dim=2304, num_quantizers=1024)


def test_grid_is_in_product_order_and_normalised():
    grid = grid_codebook(5, 4, rounded=True)
    points = np.array(list(itertools.product([-1, -0.5, 0, 0.5, 1], repeat=4)))
    assert grid.shape == (625, 4)
    assert torch.equal(grid[312], torch.zeros(4))
    others = np.delete(np.arange(625), 312)
    np.testing.assert_allclose(grid[others].norm(dim=1), 1, rtol=1e-6)
    lengths = np.linalg.norm(points[others], axis=1, keepdims=True)
    np.testing.assert_allclose(grid[others].numpy() * lengths, points[others], atol=1e-6)
    np.testing.assert_array_equal(grid_codebook(5, 4, rounded=False), points.astype(np.float32))


def test_published_codebook_has_544_distinct_codes():
    assert distinct_codes(PUBLISHED) == 544
    canonical = canonical_indices(PUBLISHED)
    assert int((canonical != torch.arange(625)).sum()) == 80
    assert canonical[312] == 312
    assert canonical[0] == 0 and canonical[156] == 0  # (-1,-1,-1,-1) and (-.5,-.5,-.5,-.5)


@pytest.mark.parametrize("levels,dim", [(2, 4), (3, 3), (4, 3), (5, 4), (7, 3), (9, 2)])
def test_canonical_is_the_lowest_index_of_the_same_direction(levels, dim):
    config = RqaeConfig(8, dim, levels, 1)
    grid = grid_codebook(levels, dim, rounded=True).double()
    same = (grid[:, None] - grid[None]).abs().amax(dim=-1) < 1e-6  # by geometry, not by integers
    assert torch.equal(canonical_indices(config), same.int().argmax(dim=1))


def test_other_methods_keep_their_indices():
    assert torch.equal(canonical_indices(RqaeConfig(8, 4, 5, 1, "fsq")), torch.arange(625))
    assert torch.equal(canonical_indices(RqaeConfig(8, 4, 37, 1, "learned")), torch.arange(37))


@pytest.mark.parametrize("levels,count", [(5, 10), (7, 26), (9, 51)])
def test_sorted_patterns(levels, count):
    patterns = sorted_patterns(levels, 4)
    assert len(patterns) == count
    assert all(list(p) == sorted(p, reverse=True) and gcd(*p) == 1 for p in patterns)


def test_bad_sizes_are_refused_with_the_key():
    with pytest.raises(RqaeError, match="'num_quantizers'"):
        RqaeConfig(8, num_quantizers=0)
    with pytest.raises(RqaeError, match="'dim'"):
        RqaeConfig(dim="8")
    with pytest.raises(RqaeError) as error:
        RqaeConfig(8, codebook_dim=8, codebook_size=9)
    assert str(error.value) == (
        "RQAE codebook: expected at most 65536 codes; seen 9^8 = 43046721; fix: use fewer levels or fewer dimensions"
    )
